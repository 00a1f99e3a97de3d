-- L1: one reservation per transaction, in one statement and one round trip. It moves the same
-- counters and writes the same rows as reserve_many does for a batch of one, and checks less:
-- neither whether the drop is live nor what the user has already.
\set i :i + 1
\set number :first + :i * :clients + :client_id
WITH hot_drop AS (
    UPDATE drops_drop
    SET available_stock = available_stock - 1, seq = seq + 1
    WHERE id = :drop AND available_stock > 0
    RETURNING id, seq, price, currency, available_stock
), hot_variant AS (
    UPDATE drops_variant AS v
    SET available_stock = v.available_stock - 1
    FROM hot_drop
    WHERE v.id = :variant AND v.drop_id = hot_drop.id AND v.available_stock > 0
    RETURNING v.id, v.available_stock
), reservation AS (
    INSERT INTO reservations_reservation
        (id, drop_id, variant_id, user_id, quantity, unit_price, currency, status,
         created_at, expires_at)
    SELECT uuidv7(), hot_drop.id, hot_variant.id,
           concat(lpad(to_hex(:number::bigint * 2654435761 % 4294967296), 8, '0'), '-0000-4000-8000-',
                  lpad(to_hex(:number::bigint), 12, '0'))::uuid,
           1, hot_drop.price, hot_drop.currency, 'ACTIVE', now(), now() + interval '1 hour'
    FROM hot_drop, hot_variant
)
INSERT INTO realtime_event (drop_id, seq, type, data, created_at)
SELECT hot_drop.id, hot_drop.seq, 'STOCK_UPDATED',
       jsonb_build_object(
           'dropId', hot_drop.id, 'availableStock', hot_drop.available_stock,
           'availability', 'available',
           'variants', jsonb_build_array(jsonb_build_object(
               'id', hot_variant.id, 'availableStock', hot_variant.available_stock))),
       now()
FROM hot_drop, hot_variant;

-- What the scripts share: who the users are, counted answers, one line of JSON at the end.
-- wrk runs init, request and response once per thread, setup and done in a state of their own.

local threads = {}
answers = {}
body_bytes = 0

-- The same ids as in benchmarks/users.py: in no order, as real ones, so that indexes are
-- written all over.
function user_id(number)
  return string.format("%08x-0000-4000-8000-%012x", number * 2654435761 % 4294967296, number)
end

function count(name, body)
  answers[name] = (answers[name] or 0) + 1
  body_bytes = #body
end

function setup(thread)
  table.insert(threads, thread)
end

function done(summary, latency, requests)
  local total, bytes = {}, 0
  for _, thread in ipairs(threads) do
    for name, number in pairs(thread:get("answers")) do
      total[name] = (total[name] or 0) + number
    end
    bytes = thread:get("body_bytes")
  end
  local counted = {}
  for name, number in pairs(total) do
    table.insert(counted, string.format('"%s": %d', name, number))
  end
  local errors = summary.errors
  print(string.format(
    '{"seconds": %.6f, "answers": {%s}, "socket_errors": %d, "body_bytes": %d, ' ..
    '"p50_us": %d, "p99_us": %d, "p999_us": %d}',
    summary.duration / 1e6, table.concat(counted, ", "),
    errors.connect + errors.read + errors.write + errors.timeout, bytes,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end

from drops.tests.factories import DropFactory


def test_shows_live_and_upcoming_drops_with_their_stock(db, client):
    DropFactory(name="Live one", sizes={"EU 42": 3, "EU 43": 4})
    DropFactory(name="Soon", upcoming=True)
    DropFactory(name="Hidden", draft=True)

    page = client.get("/").content.decode()

    assert "<b data-left>7</b> of <span data-total>7</span> left" in page
    assert "EU 42" in page
    assert "Soon" in page
    assert "Hidden" not in page


def test_shows_markup_in_names_as_text(db, client):
    DropFactory(name="<script>alert(1)</script>")

    page = client.get("/").content.decode()

    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert" not in page


def test_costs_a_constant_number_of_queries(db, client, django_assert_num_queries):
    for _ in range(8):
        DropFactory()
        DropFactory(upcoming=True)

    with django_assert_num_queries(4):
        client.get("/")

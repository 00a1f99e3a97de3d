from config.problems import Refusal


class AlreadyRefunded(Refusal):
    default_code = "already_refunded"
    default_detail = "This purchase was refunded already."

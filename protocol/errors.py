"""What can be wrong with bytes that somebody else sent: one exception, stable codes."""

from enum import IntEnum


class Code(IntEnum):
    """A stable number for each way foreign bytes can be wrong. Numbers are never reused."""

    # 1xx keys and signatures
    BAD_KEY = 101
    BAD_SIGNATURE = 102
    # 2xx runs and invites
    BAD_RUN = 201
    OTHER_RUN = 202
    BAD_INVITE = 203
    VERSION = 204
    BAD_AMENDMENT = 205
    # 3xx packets (3x0-3x4 header, the rest sections and transport)
    BAD_MAGIC = 301
    TRUNCATED = 302
    TRAILING = 303
    RESERVED = 304
    WRONG_ROUND = 305
    WRONG_BASE = 306
    TOO_LARGE = 307
    BAD_FRAME = 308
    BAD_ZSTD = 309
    BAD_RATIO = 311
    BAD_BLOCKS = 312
    BAD_INDEX = 313
    BAD_CODE = 314
    BAD_PADDING = 315
    BAD_MERKLE = 316
    BAD_TOKENS = 317
    DUPLICATE = 318
    LATE = 319
    NOT_A_MEMBER = 320
    NO_QUORUM = 321
    BANNED = 322
    # 4xx updates
    BAD_COUNT = 401
    BAD_EXPONENT = 402
    BAD_VALUE = 403
    WRONG_ROOT = 404
    # 5xx records and the ledger
    BAD_RECORD = 501
    BROKEN_CHAIN = 502
    NOT_AN_AGGREGATOR = 503
    BAD_STATE = 504
    # 6xx DHT records
    BAD_DHT_KEY = 601
    BAD_DHT_RECORD = 602
    BAD_EXPIRY = 603
    # 7xx the conversation
    BAD_MESSAGE = 701
    BAD_SESSION = 702
    NOT_FOUND = 703
    BUSY = 704
    WRONG_DIGEST = 705


class ProtocolError(Exception):
    """Foreign bytes break a rule of SPEC.md. `code` is stable; `detail` is for people."""

    def __init__(self, code: Code, detail: str) -> None:
        super().__init__(f"SL{code.value} {code.name.lower().replace('_', '-')}: {detail}")
        self.code = code
        self.detail = detail

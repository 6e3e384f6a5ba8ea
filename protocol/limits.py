"""Every number that bounds what a stranger can make us hold, in one place. Sizes are bytes."""

VERSION = 1
CHUNK = 4096  # values in a chunk; the last chunk of a tensor may be shorter
BLOCK_CHUNKS = 1024  # chunks whose gap bytes are counted together, so that decoding can run in parallel
FRAME_BYTES = 1 << 20  # one message of a bulk stream, and the target raw size of a transport frame
ZSTD_WINDOW_BYTES_MAX = 8 << 20  # what RFC 8878 wants every decoder to have
PIECE_BYTES = 4 << 20  # one leaf of the state root

GRID_BITS = 38  # dequantized values are integers in units of 2^-38
SCALE_MAX = 255  # (8 + 7) << 36, so that every value is below 4
RATIO_STEPS = 64
WEIGHT_UNIT = 1024  # the weight of a packet with the run's nominal tokens
WEIGHT_MAX = 4096
CLIP_ONE = 65536
ALPHA_ONE = 65536
ALPHA_MAX = 1 << 18
EXPONENT_MAX = 35  # the largest merged value, (15 << 36) * 4, needs no more
TOKENS_MAX = 1 << 48  # tokens in one packet, so that tokens * WEIGHT_UNIT stays far inside 64 bits
CONTRIBUTORS_MAX = 1024

TENSORS_MAX = 1 << 14
TENSOR_NAME_BYTES_MAX = 200
DIMENSIONS_MAX = 8
TENSOR_VALUES_MAX = 1 << 31  # so that the gap bytes of a section, and each plane of a frame, are counted in 32 bits
VALUES_MAX = 1 << 40
RUN_BYTES_MAX = 4 << 20
RECORD_ENTRIES_MAX = 4096
RECORD_BYTES_MAX = 1 << 20
AMENDMENT_BYTES_MAX = 64 << 10
AMENDMENTS_PER_RECORD_MAX = 64
ROUND_MAX = (1 << 32) - 1
DHT_VALUE_BYTES_MAX = 1024
DHT_TTL_S_MIN = 30
DHT_TTL_S_MAX = 1800
INVITE_CHARS_MAX = 2048

// The fast paths of the codec on the CPU: compress, encode, check, merge and outer step (protocol/SPEC.md 4, 5 and 7).
//
// A plain C ABI, called through ctypes by native.py, which also allocates everything that leaves this file. Every
// result is bit-equal to the numpy reference in protocol/, for any instruction set and any number of threads. Build
// with
// -ffp-contract=off: a fused multiply-add has one rounding where the specification has two.
//
// How one file serves every x86-64: the algorithms are inline templates over a `Simd` class, and one small function per
// instruction set, marked with __attribute__((target)), pulls them in; the compiler vectorizes the plain loops for that
// set. Only where it cannot does a Simd class use intrinsics. At run time `Isa` picks one of these functions.
//
// Foreign bytes are read by the functions under "Checking". Whatever walks over a section later does so only after the
// whole section has passed, and so needs no bounds of its own.

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "sections are little-endian and read and written in place");

#define SL_EXPORT extern "C" __attribute__((visibility("default")))
#define SL_INLINE [[gnu::always_inline]] inline

namespace {

using u8 = std::uint8_t;
using i8 = std::int8_t;
using i16 = std::int16_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i32 = std::int32_t;
using i64 = std::int64_t;

constexpr int CHUNK = 4096;
constexpr int BLOCK_CHUNKS = 1024;
constexpr int RATIO_STEPS = 64;
constexpr int EXPONENT_MAX = 35;
constexpr int GRID_BITS = 38;
constexpr int GAP_RUN = 16;  // gaps that are written together
constexpr int LANES = 16;  // buffers are padded to this many values, the widest vector there is

// What the functions of the C ABI return: 0, a protocol code (protocol/errors.py), or one of our own below 0.
enum Status : int {
    OK = 0,
    NOT_FINITE = -1,
    NO_MEMORY = -2,
    MISUSE = -3,
    TRUNCATED = 302,
    TOO_LARGE = 307,
    BAD_RATIO = 311,
    BAD_BLOCKS = 312,
    BAD_INDEX = 313,
    BAD_CODE = 314,
    BAD_PADDING = 315,
    BAD_COUNT = 401,
    BAD_EXPONENT = 402,
    BAD_VALUE = 403,
};

template <class T>
SL_INLINE T load(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class T>
SL_INLINE void store(void* to, T value) {
    std::memcpy(to, &value, sizeof value);
}

SL_INLINE int bit_length(u64 value) { return value == 0 ? 0 : 64 - __builtin_clzll(value); }

constexpr u32 MAGNITUDE = 0x7fffffff;  // the bits of a float32 without the sign; as integers they are in the same order

SL_INLINE u32 bits_of(float value) { return load<u32>(&value); }

// Callers may have switched off denormals or changed the rounding; the specification wants neither.
class DefaultArithmetic {
   public:
    DefaultArithmetic() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultArithmetic() { std::fesetenv(&saved_); }
    DefaultArithmetic(const DefaultArithmetic&) = delete;
    DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

   private:
    std::fenv_t saved_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Layout of a tensor and its sections (SPEC 3, 5, 7)

struct Tensor {
    i64 size;

    i64 chunks() const { return (size + CHUNK - 1) / CHUNK; }
    i64 blocks() const { return (chunks() + BLOCK_CHUNKS - 1) / BLOCK_CHUNKS; }
    int length(i64 chunk) const { return static_cast<int>(std::min<i64>(CHUNK, size - chunk * CHUNK)); }
};

struct PacketForm {
    Tensor tensor;
    int k;
    int code_bits;

    int kept_of(i64 length) const { return static_cast<int>(std::min<i64>(length, (k * length + CHUNK - 1) / CHUNK)); }
    int kept(i64 chunk) const { return kept_of(tensor.length(chunk)); }
    i64 kept_in_all() const { return (tensor.chunks() - 1) * kept(0) + kept(tensor.chunks() - 1); }
    i64 fixed_bytes() const { return tensor.chunks() * code_bits + 4 * (tensor.blocks() - 1); }
    static i64 gap_bytes_max(i64 count, i64 length) { return count + (length - count) / 255; }
    i64 code_bytes(i64 count) const { return (count * code_bits + 7) / 8; }
    i64 section_bytes_max() const {
        const i64 last = tensor.chunks() - 1;
        const i64 gaps = last * gap_bytes_max(kept(0), CHUNK) + gap_bytes_max(kept(last), tensor.length(last));
        return fixed_bytes() + gaps + code_bytes(kept_in_all());
    }
};

// The parts of a packet's section.
struct PacketSection {
    const u8* scales;
    const u8* ratios;  // none when code_bits is 1
    const u8* blocks;  // u32[tensor.blocks() - 1]
    const u8* gaps;
    const u8* codes;
    const u8* end;
    i64 values;

    i64 gap_bytes() const { return codes - gaps; }
    int ratio(i64 chunk) const { return ratios == nullptr ? 0 : ratios[chunk]; }
};

// The parts of an update's section.
struct UpdateSection {
    const u8* counts;  // u16[chunks]
    const u8* exponents;
    const u8* blocks;
    const u8* gaps;
    const u8* values;
    i64 value_count;

    int count(i64 chunk) const { return load<u16>(counts + 2 * chunk); }
    i64 gap_bytes() const { return values - gaps; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Checking: foreign bytes, in the order of the rules of SPEC 5 and 7, with nothing allocated

// How many of eight bytes are 255.
SL_INLINE int count_255(u64 bytes) {
    constexpr u64 LOW7 = 0x7f7f7f7f7f7f7f7f;
    const u64 zero = ~bytes;  // a byte is 0 here where it was 255
    const u64 marks = ~(((zero & LOW7) + LOW7) | zero) & ~LOW7;
    return static_cast<int>(((marks >> 7) * 0x0101010101010101) >> 56);
}

SL_INLINE int sum_of_bytes(u64 bytes) {
    constexpr u64 EVEN = 0x00ff00ff00ff00ff;
    return static_cast<int>((((bytes & EVEN) + ((bytes >> 8) & EVEN)) * 0x0001000100010001) >> 48);
}

// Walk over `count` gaps. Return where they end, or null when the bytes end before them; `reached` grows by what they
// advance. While eight gaps are still to come, eight bytes cannot go beyond the last one.
SL_INLINE const u8* walk_gaps(const u8* at, const u8* end, int count, i64& reached) {
    while (count >= 8 && end - at >= 8) {
        const u64 bytes = load<u64>(at);
        const int ends = 8 - count_255(bytes);
        reached += sum_of_bytes(bytes) + ends;
        count -= ends;
        at += 8;
    }
    while (count > 0) {
        if (at == end) return nullptr;
        const int byte = *at++;
        const int ends = byte != 255;
        reached += byte + ends;
        count -= ends;
    }
    return at;
}

using Walk = const u8* (*)(const u8* at, const u8* end, int count, i64& reached);
Walk walk_here();  // the fastest for this machine

// Check BAD_BLOCKS and BAD_INDEX; the former, wherever it is, comes before the latter.
template <class Section, class Count>
int check_gaps(Tensor tensor, const Section& section, Count count_of) {
    const Walk walk = walk_here();
    const u8* at = section.gaps;
    const u8* const stop = section.gaps + section.gap_bytes();
    bool inside = true;
    for (i64 block = 0; block < tensor.blocks(); ++block) {
        const bool is_last = block + 1 == tensor.blocks();
        const i64 length = is_last ? stop - at : static_cast<i64>(load<u32>(section.blocks + 4 * block));
        if (length > stop - at) return BAD_BLOCKS;
        const u8* const end = at + length;
        const i64 chunk_stop = std::min<i64>(tensor.chunks(), (block + 1) * BLOCK_CHUNKS);
        for (i64 chunk = block * BLOCK_CHUNKS; chunk < chunk_stop; ++chunk) {
            i64 reached = 0;  // one more than the last index
            at = walk(at, end, count_of(chunk), reached);
            if (at == nullptr) return BAD_BLOCKS;
            inside &= reached <= tensor.length(chunk);
        }
        if (at != end) return BAD_BLOCKS;
    }
    return inside ? OK : BAD_INDEX;
}

// At least 57 bits of a plane from this bit on; zeros where the plane ends.
SL_INLINE u64 bits_at(const u8* plane, const u8* end, i64 bit) {
    const u8* const at = plane + bit / 8;
    u64 word = 0;
    if (end - at >= 8) {
        word = load<u64>(at);
    } else {
        std::memcpy(&word, at, static_cast<std::size_t>(end - at));
    }
    return word >> (bit % 8);
}

i64 count_values(const PacketForm& form, const u8* scales) {
    const i64 last = form.tensor.chunks() - 1;
    i64 present = 0;
    for (i64 chunk = 0; chunk < last; ++chunk) present += scales[chunk] != 0;
    return present * form.kept(0) + (scales[last] != 0 ? form.kept(last) : 0);
}

int split_packet_section(const u8* data, i64 length, const PacketForm& form, PacketSection& section) {
    const i64 chunks = form.tensor.chunks();
    if (length > form.section_bytes_max()) return TOO_LARGE;
    if (length < form.fixed_bytes()) return TRUNCATED;
    section.scales = data;
    section.ratios = form.code_bits == 2 ? data + chunks : nullptr;
    section.blocks = data + chunks * form.code_bits;
    section.gaps = data + form.fixed_bytes();
    section.end = data + length;
    section.values = count_values(form, data);
    const i64 code_bytes = form.code_bytes(section.values);
    if (length - form.fixed_bytes() < code_bytes) return TRUNCATED;
    section.codes = section.end - code_bytes;
    return OK;
}

bool ratios_are_good(const PacketForm& form, const PacketSection& section) {
    bool good = true;
    for (i64 chunk = 0; chunk < form.tensor.chunks(); ++chunk) {
        const int ratio = section.ratios[chunk];
        good &= ratio < RATIO_STEPS && (ratio == 0 || section.scales[chunk] != 0);
    }
    return good;
}

// A chunk has low values if and only if it has a ratio, and then high ones too.
int check_lows(const PacketForm& form, const PacketSection& section) {
    constexpr int STEP = 28;  // codes that one call of bits_at surely holds
    constexpr u64 EVEN = 0x5555555555555555;
    bool complete = true;
    i64 bit = 0;
    for (i64 chunk = 0; chunk < form.tensor.chunks(); ++chunk) {
        if (section.scales[chunk] == 0) continue;
        u64 low = 0;
        u64 high = 0;
        for (int left = form.kept(chunk); left > 0; left -= STEP) {
            const int count = std::min(left, STEP);
            const u64 wanted = EVEN & ((u64{1} << (2 * count)) - 1);
            const u64 second = bits_at(section.codes, section.end, bit) >> 1;
            low |= second & wanted;
            high |= ~second & wanted;
            bit += 2 * count;
        }
        if (section.ratios[chunk] == 0 && low != 0) return BAD_CODE;
        complete &= section.ratios[chunk] == 0 || (low != 0 && high != 0);
    }
    return complete ? OK : BAD_RATIO;
}

int check_packet_section(const u8* data, i64 length, const PacketForm& form, PacketSection& section) {
    if (const int code = split_packet_section(data, length, form, section)) return code;
    if (form.code_bits == 2 && !ratios_are_good(form, section)) return BAD_RATIO;
    const auto count_of = [&](i64 chunk) { return section.scales[chunk] == 0 ? 0 : form.kept(chunk); };
    if (const int code = check_gaps(form.tensor, section, count_of)) return code;
    const int used_bits = static_cast<int>(section.values * form.code_bits % 8);
    if (used_bits != 0 && section.end[-1] >> used_bits != 0) return BAD_PADDING;
    return form.code_bits == 2 ? check_lows(form, section) : OK;
}

int split_update_section(const u8* data, i64 length, Tensor tensor, UpdateSection& section) {
    const i64 chunks = tensor.chunks();
    const i64 fixed_bytes = 3 * chunks + 4 * (tensor.blocks() - 1);
    if (length > fixed_bytes + 2 * tensor.size) return TOO_LARGE;
    if (length < fixed_bytes) return TRUNCATED;
    section.counts = data;
    section.exponents = data + 2 * chunks;
    section.blocks = data + 3 * chunks;
    section.gaps = data + fixed_bytes;
    section.value_count = 0;
    bool good = true;
    for (i64 chunk = 0; chunk < chunks; ++chunk) {
        good &= section.count(chunk) <= tensor.length(chunk);
        section.value_count += section.count(chunk);
    }
    if (!good) return BAD_COUNT;
    if (length - fixed_bytes < section.value_count) return TRUNCATED;
    section.values = data + length - section.value_count;
    return OK;
}

// No value is 0 or -128, and an exponent that is not 0 is no larger than its chunk needs.
int check_values(Tensor tensor, const UpdateSection& section) {
    const i8* at = reinterpret_cast<const i8*>(section.values);
    bool fine = true;
    for (i64 chunk = 0; chunk < tensor.chunks(); ++chunk) {
        const int count = section.count(chunk);
        u8 bad = 0;
        u8 large = 0;
        for (int i = 0; i < count; ++i) {
            const i8 value = at[i];
            bad |= static_cast<u8>((value == 0) | (value == -128));
            large |= static_cast<u8>((value > 63) | (value < -63));
        }
        if (bad != 0) return BAD_VALUE;
        fine &= section.exponents[chunk] == 0 || large != 0;
        at += count;
    }
    return fine ? OK : BAD_EXPONENT;
}

int check_whole_update_section(const u8* data, i64 length, Tensor tensor, UpdateSection& section) {
    if (const int code = split_update_section(data, length, tensor, section)) return code;
    bool good = true;
    for (i64 chunk = 0; chunk < tensor.chunks(); ++chunk) {
        const int exponent = section.exponents[chunk];
        good &= exponent <= EXPONENT_MAX && (exponent == 0 || section.count(chunk) != 0);
    }
    if (!good) return BAD_EXPONENT;
    const auto count_of = [&](i64 chunk) { return section.count(chunk); };
    if (const int code = check_gaps(tensor, section, count_of)) return code;
    return check_values(tensor, section);
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing

// Collects bits, least significant first, and writes whole words, so never beyond what was pushed.
class BitWriter {
   public:
    explicit BitWriter(u8* to) : at_(to) {}

    // n is 1 to 64, and the bits above the n-th are zero.
    SL_INLINE void push(u64 bits, int n) {
        pending_ |= bits << filled_;
        if (filled_ + n < 64) {
            filled_ += n;
            return;
        }
        store(at_, pending_);
        at_ += 8;
        pending_ = filled_ == 0 ? 0 : bits >> (64 - filled_);
        filled_ += n - 64;
    }

    // Write the rest, padded with zeros to a byte; return the end.
    u8* finish() {
        const int bytes = (filled_ + 7) / 8;
        std::memcpy(at_, &pending_, static_cast<std::size_t>(bytes));
        return at_ + bytes;
    }

   private:
    u8* at_;
    u64 pending_ = 0;
    int filled_ = 0;
};

// Write the gaps of ascending indices; return where they end. In most runs no gap is 255 or more, and each is a byte.
template <class Simd>
SL_INLINE u8* write_gaps(const u16* indices, int count, u8* to) {
    int previous = -1;
    int done = 0;
    while (done < count) {
        if (done > 0 && done + GAP_RUN <= count && Simd::write_short_gaps(indices + done, to)) {
            to += GAP_RUN;
            done += GAP_RUN;
            previous = indices[done - 1];
            continue;
        }
        const int stop = std::min(done + GAP_RUN, count);
        for (; done < stop; ++done) {
            int gap = indices[done] - previous - 1;
            previous = indices[done];
            for (; gap >= 255; gap -= 255) *to++ = 255;
            *to++ = static_cast<u8>(gap);
        }
    }
    return to;
}

// ---------------------------------------------------------------------------------------------------------------------
// Compressing one chunk (SPEC 4)

// Chunks that go through the error feedback together before the first of them is quantized, so that the memory is read
// in long runs; they stay in the second-level cache.
constexpr int BATCH = 8;

// The values of a chunk that may be among the largest.
struct Candidates {
    alignas(64) u32 bits[CHUNK + LANES];  // as float32
    alignas(64) u16 indices[CHUNK + 2 * LANES];
    int count;
    u32 least;  // all that have this magnitude are among them, and no others

    // Vectors reach beyond the last candidate; what they find there is smaller than any.
    SL_INLINE void pad() {
        for (int i = 0; i < LANES; ++i) bits[count + i] = 0;
    }
};

// Neighbouring chunks have similar cuts. So the error feedback already collects candidates while it waits for memory,
// from a magnitude on that the cut most likely reaches: the mean of the cuts so far less twice their mean deviation,
// both fading. Bits of magnitudes are close to logarithms, so differences mean ratios. No guess changes what is chosen.
class Guess {
   public:
    u32 least() const { return least_; }

    void learn(u32 cut) {
        const i64 off = static_cast<i64>(cut) - mean_;
        mean_ = mean_ == 0 ? cut : mean_ + off / 8;
        deviation_ += (std::min(std::abs(off), FAR) - deviation_) / 8;
        least_ = static_cast<u32>(std::max<i64>(1, mean_ - 2 * deviation_ - MARGIN));
    }

   private:
    static constexpr i64 FAR = 1 << 24;     // a factor of four
    static constexpr i64 MARGIN = 1 << 17;  // one percent
    i64 mean_ = 0;
    i64 deviation_ = FAR / 16;
    u32 least_ = MAGNITUDE;
};

struct CompressScratch {
    Candidates candidates[BATCH];
    alignas(64) u16 maxima[BATCH][CHUNK];
    alignas(64) u32 fixed[CHUNK + LANES];
    alignas(64) float rest[CHUNK];
    alignas(64) u8 codes[CHUNK];
    alignas(64) float short_chunk[3][CHUNK];  // the last chunk of a tensor, filled up with zeros
    Guess guess;
};

// Up to BATCH whole chunks.
struct ChunkInput {
    float* residual;  // becomes acc, then the new residual
    const float* outer;
    const float* local;
    float beta;
    int count;  // values to keep
    int code_bits;
    i64 start;  // position of the first chunk in the tensor
};

// Where the parts of a chunk go; moves on as they are written.
struct ChunkOutput {
    u8* gaps;
    BitWriter codes;
    i64* positions;
    float* originals;
    u8* scales;
    u8* ratios;
};

struct Threshold {
    u32 bits;
    int count;  // how many values are at least that large
};

// The largest threshold that the magnitudes of at least k values reach, found two bits at a time; any that at most
// k + slack reach will do. All lie between `least` and `most`; those above the n-th are 0 and not counted.
template <class Simd, class Value>
SL_INLINE Threshold find_threshold(const Value* values, int n, int k, u32 least, u32 most, int slack) {
    constexpr int WIDTH = 4 * LANES / static_cast<int>(sizeof(Value));
    constexpr u64 LARGEST = sizeof(Value) == 4 ? MAGNITUDE : 0x7fff;
    const int padded = (n + WIDTH - 1) / WIDTH * WIDTH;
    const int pairs = (bit_length(least ^ most) + 1) / 2;
    Threshold found{static_cast<u32>(u64{least} >> (2 * pairs) << (2 * pairs)), n};
    for (int pair = pairs - 1; pair >= 0 && found.count > k + slack; --pair) {
        const u32 step = 1u << (2 * pair);
        u32 limits[3];
        for (u32 i = 0; i < 3; ++i) {
            limits[i] = static_cast<u32>(std::min<u64>(found.bits + (i + 1) * u64{step}, LARGEST));
        }
        int counts[4] = {found.count};
        Simd::count_from(values, padded, limits, counts + 1);
        const int steps = (counts[1] >= k) + (counts[2] >= k) + (counts[3] >= k);
        found.bits += static_cast<u32>(steps) * step;
        found.count = counts[steps];
    }
    return found;
}

// Each maximum covers this many values. There must be at least as many maxima as values to keep, and twice as many keep
// the number of candidates low.
SL_INLINE int rows_of_block(int count) { return count <= 128 ? 16 : count <= 256 ? 8 : count <= 512 ? 4 : 1; }

// Narrow the candidates down to the `count` largest, the lower index first where magnitudes are equal. Returns a
// threshold that all that are kept reach.
template <class Simd>
SL_INLINE u32 keep_largest(Candidates& candidates, int count, u32 most) {
    u32* const bits = candidates.bits;
    u16* const indices = candidates.indices;
    const int n = candidates.count;
    if (n == count) return candidates.least;
    candidates.pad();
    const Threshold cut = find_threshold<Simd>(bits, n, count, candidates.least, most, 0);
    if (cut.count == count) {
        Simd::keep_from(candidates, cut.bits);
        return cut.bits;
    }
    // The bit search went to its end, so that cut.bits is the count-th largest magnitude, and some of its equals go.
    int ties = count;
    for (int i = 0; i < n; ++i) ties -= (bits[i] & MAGNITUDE) > cut.bits;
    int kept = 0;
    for (int i = 0; i < n; ++i) {
        const u32 magnitude = bits[i] & MAGNITUDE;
        const bool is_tie = magnitude == cut.bits && ties > 0;
        indices[kept] = indices[i];
        bits[kept] = bits[i];
        ties -= is_tie;
        kept += magnitude > cut.bits || is_tie;
    }
    return cut.bits;
}

struct Share {
    i64 count;
    u64 sum;
};

// Number and sum of those above a limit.
SL_INLINE Share above(const u32* fixed, int padded, u32 limit) {
    u32 count = 0;
    u64 sum = 0;
    for (int i = 0; i < padded; ++i) {
        const u32 value = static_cast<i32>(fixed[i]) > static_cast<i32>(limit) ? fixed[i] : 0;
        count += value != 0;
        sum += value;
    }
    return {count, sum};
}

// A chunk's two magnitudes, and which values take which: a value is low when it is at most `limit` and there is a
// ratio.
struct Quantizer {
    int scale;  // 0: the chunk is absent
    int ratio;
    u32 limit;
};

struct Split {
    u32 limit;
    bool has_low;
    u64 high;
    u64 low;
};

// Split at a limit into high and low values and take the mean of each. Where none is above, all are high.
SL_INLINE Split split_at(const u32* fixed, int padded, int n, u64 total, u64 limit) {
    const Share share = above(fixed, padded, static_cast<u32>(limit));
    if (share.count == 0 || share.count == n) {
        const u64 mean = total / static_cast<u64>(n);
        return {0, false, mean, mean};
    }
    const u64 high = share.sum / static_cast<u64>(share.count);
    return {static_cast<u32>(limit), true, high, (total - share.sum) / static_cast<u64>(n - share.count)};
}

// Steps 3 to 7 of SPEC 4 for n kept values, of whose magnitudes the largest is at least 2^-31. Then one unit of `fixed`
// is 2^(exponent - 156) and the largest is 2^29 or more, so no mean is 0. Of integers, x * n > S where x > floor(S /
// n).
SL_INLINE Quantizer quantize(const u32* bits, int n, u32 most, int code_bits, u32* fixed) {
    const int exponent = std::max(1, static_cast<int>(most >> 23));
    for (int i = 0; i < n; ++i) {
        const int field = static_cast<int>(bits[i] >> 23 & 0xff);
        const u32 mantissa = (bits[i] & 0x7fffff) | (field > 0 ? 0x800000u : 0u);
        fixed[i] = (mantissa << 6) >> std::min(exponent - std::max(field, 1), 31);
    }
    for (int i = n; i % LANES != 0; ++i) fixed[i] = 0;
    const int padded = (n + LANES - 1) / LANES * LANES;
    const u64 total = above(fixed, padded, 0).sum;
    Split split{0, false, total / static_cast<u64>(n), 0};
    if (code_bits == 2) {
        split = split_at(fixed, padded, n, total, split.high);
        split = split_at(fixed, padded, n, total, (split.high + split.low) / 2);
    }
    int shift = std::max(0, bit_length(split.high) - 4);
    u64 digits = (split.high + ((u64{1} << shift) >> 1)) >> shift;
    if (digits == 16) {
        digits = 8;
        ++shift;
    }
    const u64 high = digits << shift;
    const int scale = (exponent + shift - 123) * 8 + static_cast<int>(digits) - 8;
    if (scale <= 0) return {0, 0, 0};
    Quantizer quantizer{std::min(scale, 255), 0, split.limit};
    if (!split.has_low) return quantizer;
    const i64 ratio = RATIO_STEPS - static_cast<i64>((128 * split.low + high) / (2 * high));
    quantizer.ratio = static_cast<int>(std::clamp<i64>(ratio, 0, RATIO_STEPS - 1));
    const u64 low = (high * static_cast<u64>(RATIO_STEPS - quantizer.ratio)) >> 6;
    const u32 nearest = static_cast<u32>((high + low) / 2);
    const i64 highs = above(fixed, padded, nearest).count;
    if (highs > 0 && highs < n) quantizer.limit = nearest;
    return quantizer;
}

// The four values that codes can mean, in units of 2^-38 and without sign: high, high, low, low.
SL_INLINE u64 high_of(int scale) { return static_cast<u64>(8 + (scale & 7)) << ((scale >> 3) + 5); }
SL_INLINE u64 low_of(u64 high, int ratio) { return (high * static_cast<u64>(RATIO_STEPS - ratio)) >> 6; }

// Eight codes of 1 or 2 bits, one in each byte, moved together.
SL_INLINE u64 squeeze(u64 codes, int bits) {
    if (bits == 2) {
        codes = (codes | codes >> 6) & 0x000f000f000f000f;
        codes = (codes | codes >> 12) & 0x000000ff000000ff;
        return (codes | codes >> 24) & 0xffff;
    }
    codes = (codes | codes >> 7) & 0x0003000300030003;
    codes = (codes | codes >> 14) & 0x0000000f0000000f;
    return (codes | codes >> 28) & 0xff;
}

SL_INLINE void push_codes(const u8* codes, int count, int bits, BitWriter& writer) {
    int i = 0;
    for (; i + 8 <= count; i += 8) writer.push(squeeze(load<u64>(codes + i), bits), 8 * bits);
    if (i < count) {
        u64 rest = 0;
        std::memcpy(&rest, codes + i, static_cast<std::size_t>(count - i));
        writer.push(squeeze(rest, bits), (count - i) * bits);
    }
}

// Write gaps, codes, positions and originals of a chunk's kept values, and take what is sent out of the residual. One
// short loop for each, which the compiler can vectorize.
template <class Simd>
SL_INLINE void send(const ChunkInput& in, const Candidates& kept, const Quantizer& quantizer, CompressScratch& scratch,
                    ChunkOutput& out) {
    constexpr float UNIT = 1.0f / (u64{1} << GRID_BITS);
    const u64 high = high_of(quantizer.scale);
    const u32 high_bits = bits_of(static_cast<float>(high) * UNIT);
    const u32 low_bits = bits_of(static_cast<float>(low_of(high, quantizer.ratio)) * UNIT);
    const i32 limit = quantizer.ratio == 0 ? -1 : static_cast<i32>(quantizer.limit);
    const int count = in.count;
    for (int i = 0; i < count; ++i) {
        const bool is_low = static_cast<i32>(scratch.fixed[i]) <= limit;
        const u32 sign = kept.bits[i] & ~MAGNITUDE;
        scratch.codes[i] = static_cast<u8>(sign >> 31 | (is_low ? 2u : 0u));
        const u32 sent = sign | (is_low ? low_bits : high_bits);
        scratch.rest[i] = load<float>(kept.bits + i) - load<float>(&sent);
    }
    for (int i = 0; i < count; ++i) in.residual[kept.indices[i]] = scratch.rest[i];
    for (int i = 0; i < count; ++i) out.positions[i] = in.start + kept.indices[i];
    std::memcpy(out.originals, kept.bits, static_cast<std::size_t>(count) * sizeof(float));
    out.gaps = write_gaps<Simd>(kept.indices, count, out.gaps);
    push_codes(scratch.codes, count, in.code_bits, out.codes);
    out.positions += count;
    out.originals += count;
}

// Where the next chunk's output will go is known, and nothing else would bring these lines into the cache in time.
SL_INLINE void fetch_ahead(const ChunkOutput& out, int count) {
    for (int i = 0; i < count; i += 8) __builtin_prefetch(out.positions + count + i, 1, 2);
    for (int i = 0; i < count; i += 16) __builtin_prefetch(out.originals + count + i, 1, 2);
}

// Bring the candidates to not many more than `count`. The k-th largest maximum is reached by k values in as many
// blocks, so it cannot be too large a threshold; the upper half of its bits is close enough.
template <class Simd>
SL_INLINE void narrow_down(const float* acc, int count, u32 most, const u16* maxima, Candidates& candidates) {
    if (candidates.count >= count && candidates.count <= 2 * count) return;
    const int blocks = CHUNK / rows_of_block(count);
    const u32 smallest = *std::min_element(maxima, maxima + blocks);
    const u32 least = find_threshold<Simd>(maxima, blocks, count, smallest, most >> 16, count / 8).bits << 16;
    if (candidates.least > least) {
        candidates.least = least;
        Simd::pick_from(acc, candidates);
    } else {
        candidates.pad();
        Simd::keep_from(candidates, least);
    }
}

template <class Simd>
SL_INLINE void compress_chunk(const ChunkInput& in, u32 most, const u16* maxima, Candidates& candidates,
                              CompressScratch& scratch, ChunkOutput& out) {
    constexpr u32 ABSENT = 0x30000000;  // 2^-31: below it no scale rounds to more than 2^-30
    *out.scales = *out.ratios = 0;
    if (most < ABSENT) return;
    fetch_ahead(out, in.count);
    narrow_down<Simd>(in.residual, in.count, most, maxima, candidates);
    scratch.guess.learn(keep_largest<Simd>(candidates, in.count, most));
    const Quantizer quantizer = quantize(candidates.bits, in.count, most, in.code_bits, scratch.fixed);
    *out.scales = static_cast<u8>(quantizer.scale);
    *out.ratios = static_cast<u8>(quantizer.ratio);
    if (quantizer.scale > 0) send<Simd>(in, candidates, quantizer, scratch, out);
}

template <class Simd>
SL_INLINE int compress_batch(ChunkInput in, int chunks, CompressScratch& scratch, ChunkOutput& out) {
    constexpr u32 INFINITE = 0x7f800000;  // NaN has larger bits still
    u32 most[BATCH];
    ChunkInput at = in;
    for (int c = 0; c < chunks; ++c) {
        scratch.candidates[c].least = scratch.guess.least();
        most[c] = Simd::feedback(at, rows_of_block(in.count), scratch.maxima[c], scratch.candidates[c]);
        if (most[c] >= INFINITE) return NOT_FINITE;
        at.residual += CHUNK;
        at.outer += CHUNK;
        at.local += CHUNK;
    }
    at = in;
    for (int c = 0; c < chunks; ++c) {
        compress_chunk<Simd>(at, most[c], scratch.maxima[c], scratch.candidates[c], scratch, out);
        at.residual += CHUNK;
        at.start += CHUNK;
        ++out.scales;
        ++out.ratios;
    }
    return OK;
}

// ---------------------------------------------------------------------------------------------------------------------
// Merging one chunk (SPEC 7)

// A sum of one position, as narrow as the sums of a chunk allow; in the first two num stands in the high bits and den
// in the low ones.
using Narrow = i32;
using Packed = i64;
struct Wide {
    i64 num;
    i64 den;
};

struct MergeScratch {
    // One of them is in use at a time, and all zero in between.
    alignas(64) Narrow narrow[CHUNK];
    alignas(64) Packed packed[CHUNK];
    alignas(64) Wide wide[CHUNK];
    alignas(64) Narrow found_narrow[CHUNK + LANES];
    alignas(64) Packed found_packed[CHUNK + LANES];
    alignas(64) i64 num[CHUNK];
    alignas(64) i64 den[CHUNK];
    alignas(64) u16 indices[CHUNK + 2 * LANES];
    alignas(64) i8 values[CHUNK + 4 * LANES];
};

// One accepted packet, and how far its section has been read.
struct Source {
    PacketSection section;
    i64 weight;
    i64 clip;
    const u8* gaps;
    i64 bit;   // of the next code
    i64 high;  // this chunk's values, clipped and times the weight
    i64 low;
};

struct MergePlan {
    PacketForm form;
    bool by_senders;
    i64 total_weight;
    i64 alpha_q16;
    int weight_zeros;  // trailing zero bits that all weights and their sum have
};

struct MergeOutput {
    int count;
    int exponent;
    u8* gaps;
    u8* values;
};

// How the sums of a chunk fit into one integer each: (num >> zeros) << den_bits, plus den >> weight_zeros.
struct Packing {
    int bits;  // that a sum takes, sign included
    int zeros;
    int den_bits;
};

// Look up what each packet adds in this chunk.
SL_INLINE Packing prepare(Source* sources, int count, i64 chunk, const MergePlan& plan) {
    u64 all_bits = 0;
    u64 most = 0;
    for (int r = 0; r < count; ++r) {
        Source& source = sources[r];
        const int scale = source.section.scales[chunk];
        if (scale == 0) continue;
        const u64 high = high_of(scale);
        const u64 low = low_of(high, source.section.ratio(chunk));
        source.high = static_cast<i64>((high * static_cast<u64>(source.clip)) >> 16) * source.weight;
        source.low = static_cast<i64>((low * static_cast<u64>(source.clip)) >> 16) * source.weight;
        all_bits |= static_cast<u64>(source.high | source.low);
        most += static_cast<u64>(source.high);
    }
    const int zeros = all_bits == 0 ? plan.weight_zeros : __builtin_ctzll(all_bits);
    const int den_bits = bit_length(static_cast<u64>(plan.total_weight >> plan.weight_zeros));
    return {1 + bit_length(most >> zeros) + den_bits, zeros, den_bits};
}

template <class Sum>
SL_INLINE void add_to(Sum& sum, const Sum& addend) {
    sum += addend;
}
SL_INLINE void add_to(Wide& sum, const Wide& addend) {
    sum.num += addend.num;
    sum.den += addend.den;
}

// What a packet adds for one value.
template <class Sum>
SL_INLINE Sum addend(i64 num, i64 weight, const MergePlan& plan, Packing packing) {
    return static_cast<Sum>((num >> packing.zeros) * (i64{1} << packing.den_bits) + (weight >> plan.weight_zeros));
}
template <>
SL_INLINE Wide addend<Wide>(i64 num, i64 weight, const MergePlan&, Packing) {
    return {num, weight};
}

// Add one packet's values of a chunk; table holds what each code adds. The section has passed all checks.
template <int CODE_BITS, class Sum>
SL_INLINE void accumulate(Source& source, int count, const Sum (&table)[4], Sum* sums) {
    const u8* at = source.gaps;
    int index = -1;
    while (count > 0) {
        const int usable = static_cast<int>((64 - source.bit % 8) / CODE_BITS);
        const int batch = std::min(count, usable);
        u64 word = bits_at(source.section.codes, source.section.end, source.bit);
        for (int i = 0; i < batch; ++i) {
            int byte = *at++;
            while (__builtin_expect(byte == 255, 0)) {
                index += 255;
                byte = *at++;
            }
            index += byte + 1;
            add_to(sums[index], table[word & ((1 << CODE_BITS) - 1)]);
            word >>= CODE_BITS;
        }
        source.bit += batch * CODE_BITS;
        count -= batch;
    }
    source.gaps = at;
}

template <class Sum>
SL_INLINE void add_all(Source* sources, int count, i64 chunk, const MergePlan& plan, Packing packing, Sum* sums) {
    const int kept = plan.form.kept(chunk);
    for (int r = 0; r < count; ++r) {
        Source& source = sources[r];
        if (source.section.scales[chunk] == 0) continue;
        Sum table[4];
        for (int code = 0; code < 4; ++code) {
            const i64 num = code & 2 ? source.low : source.high;
            table[code] = addend<Sum>(code & 1 ? -num : num, source.weight, plan, packing);
        }
        if (plan.form.code_bits == 2) {
            accumulate<2>(source, kept, table, sums);
        } else {
            accumulate<1>(source, kept, table, sums);
        }
    }
}

// Take out the sums that are not zero, with their indices, and leave zeros.
SL_INLINE int collect_wide(MergeScratch& scratch, int length) {
    int n = 0;
    for (int i = 0; i < length; ++i) {
        scratch.num[n] = scratch.wide[i].num;
        scratch.den[n] = scratch.wide[i].den;
        scratch.indices[n] = static_cast<u16>(i);
        n += scratch.wide[i].den != 0;
        scratch.wide[i] = Wide{0, 0};
    }
    return n;
}

SL_INLINE void unpack(MergeScratch& scratch, int n, const MergePlan& plan, Packing packing) {
    const i64 den_mask = (i64{1} << packing.den_bits) - 1;
    const i64 scale = i64{1} << packing.zeros;
    for (int i = 0; i < n; ++i) {
        const i64 sum = scratch.found_packed[i];
        scratch.den[i] = (sum & den_mask) << plan.weight_zeros;
        scratch.num[i] = (sum >> packing.den_bits) * scale;
    }
}

// Divide, multiply by alpha, and return the largest magnitude; num becomes a of SPEC 7.
//
// The integer division is a floating one and a correction. With n = |num| < 2^63, 1 <= d < 2^23 and n / d < 2^40 (a
// weighted mean of values below 2^40), converting n and dividing each have a relative error of at most 2^-53, so the
// estimate is off by less than 2^40 * 2^-51 = 2^-11 before it is truncated: t is floor(n / d) or one beside it, and
// n - t * d, which is below 2^63 in magnitude, tells which.
SL_INLINE i64 divide(i64* num, const i64* den, int n, bool by_senders, const MergePlan& plan) {
    i64 most = 0;
    for (int i = 0; i < n; ++i) {
        const i64 divisor = by_senders ? den[i] : plan.total_weight;
        const i64 sign = num[i] >> 63;
        const i64 magnitude = (num[i] ^ sign) - sign;
        i64 quotient = static_cast<i64>(static_cast<double>(magnitude) / static_cast<double>(divisor));
        const i64 rest = magnitude - quotient * divisor;
        quotient += (rest >= divisor ? 1 : 0) - (rest < 0 ? 1 : 0);
        const i64 step = (quotient * plan.alpha_q16) >> 16;
        most = std::max(most, step);
        num[i] = (step ^ sign) - sign;
    }
    return most;
}

// The same for narrow sums, where d >> weight_zeros is an integer D below 2^12, and so the quotient is that of an
// integer, exact as a double, and D. It needs no correction: below 2^40 a double that is rounded up to an integer m was
// at least m - 2^-13, and a fraction with denominator D that is less than m is at most m - 2^-12.
SL_INLINE i64 divide_narrow(const Narrow* sums, i64* num, int n, bool by_senders, const MergePlan& plan,
                            Packing packing) {
    const Narrow den_mask = (1 << packing.den_bits) - 1;
    const double scale = static_cast<double>(i64{1} << (packing.zeros - plan.weight_zeros));
    const double total = static_cast<double>(plan.total_weight >> plan.weight_zeros);
    i64 most = 0;
    for (int i = 0; i < n; ++i) {
        const i32 high = sums[i] >> packing.den_bits;
        const i64 sign = high >> 31;
        const double divisor = by_senders ? static_cast<double>(sums[i] & den_mask) : total;
        const i64 quotient = static_cast<i64>(static_cast<double>(std::abs(high)) * scale / divisor);
        const i64 step = (quotient * plan.alpha_q16) >> 16;
        most = std::max(most, step);
        num[i] = (step ^ sign) - sign;
    }
    return most;
}

SL_INLINE int exponent_of(u64 most) {
    int exponent = std::max(0, bit_length(most) - 7);
    if ((most + ((u64{1} << exponent) >> 1)) >> exponent > 127) ++exponent;
    return exponent;
}

// Round to signed bytes; return how many are not 0.
SL_INLINE int round_steps(const i64* steps, int n, int exponent, i8* values) {
    const i64 half = (i64{1} << exponent) >> 1;
    int zeros = 0;
    for (int i = 0; i < n; ++i) {
        const i64 sign = steps[i] >> 63;
        const i64 rounded = (((steps[i] ^ sign) - sign) + half) >> exponent;
        const i8 value = static_cast<i8>((rounded ^ sign) - sign);
        zeros += value == 0;
        values[i] = value;
    }
    return n - zeros;
}

// Merge a chunk's values into scratch.num; return how many there are, and the largest magnitude.
template <class Simd>
SL_INLINE int merge_values(Source* sources, int count, i64 chunk, const MergePlan& plan, MergeScratch& scratch,
                           i64& most) {
    constexpr int NARROW_DEN_BITS = 12;
    const Packing packing = prepare(sources, count, chunk, plan);
    int n;
    if (packing.bits <= 32 && packing.den_bits <= NARROW_DEN_BITS) {
        add_all(sources, count, chunk, plan, packing, scratch.narrow);
        n = Simd::collect(scratch.narrow, scratch.found_narrow, scratch.indices);
        most = plan.by_senders ? divide_narrow(scratch.found_narrow, scratch.num, n, true, plan, packing)
                               : divide_narrow(scratch.found_narrow, scratch.num, n, false, plan, packing);
        return n;
    }
    if (packing.bits <= 64) {
        add_all(sources, count, chunk, plan, packing, scratch.packed);
        n = Simd::collect(scratch.packed, scratch.found_packed, scratch.indices);
        unpack(scratch, n, plan, packing);
    } else {
        add_all(sources, count, chunk, plan, packing, scratch.wide);
        n = collect_wide(scratch, plan.form.tensor.length(chunk));
    }
    most = plan.by_senders ? divide(scratch.num, scratch.den, n, true, plan)
                           : divide(scratch.num, scratch.den, n, false, plan);
    return n;
}

template <class Simd>
SL_INLINE void merge_chunk(Source* sources, int count, i64 chunk, const MergePlan& plan, MergeScratch& scratch,
                           MergeOutput& out) {
    i64 most;
    const int n = merge_values<Simd>(sources, count, chunk, plan, scratch, most);
    out.exponent = exponent_of(static_cast<u64>(most));
    out.count = round_steps(scratch.num, n, out.exponent, scratch.values);
    if (out.count < n) Simd::drop_zeros(scratch.values, scratch.indices, n);
    out.gaps = write_gaps<Simd>(scratch.indices, out.count, out.gaps);
    std::memcpy(out.values, scratch.values, static_cast<std::size_t>(out.count));
    out.values += out.count;
}

// ---------------------------------------------------------------------------------------------------------------------
// Instruction sets

struct Portable {
    // Error feedback on one chunk. Collects candidates from found.least on, and the upper half of the largest magnitude
    // of each block, in which values stand a vector apart; returns the largest of all.
    SL_INLINE static u32 feedback(const ChunkInput& in, int rows, u16* maxima, Candidates& found) {
        constexpr int WIDTH = 4;
        i32 most = 0;
        for (int group = 0; group < CHUNK; group += WIDTH * rows) {
            i32 block[WIDTH] = {};
            for (int i = group; i < group + WIDTH * rows; i += WIDTH) {
                for (int lane = 0; lane < WIDTH; ++lane) {
                    const float difference = in.outer[i + lane] - in.local[i + lane];
                    const float kept_back = in.beta * in.residual[i + lane];
                    const float acc = kept_back + difference;
                    in.residual[i + lane] = acc;
                    // Signed comparison is the one that every vector unit has.
                    block[lane] = std::max(block[lane], static_cast<i32>(bits_of(acc) & MAGNITUDE));
                }
            }
            for (int lane = 0; lane < WIDTH; ++lane) {
                maxima[group / rows + lane] = static_cast<u16>(block[lane] >> 16);
                most = std::max(most, block[lane]);
            }
        }
        pick_from(in.residual, found);
        return static_cast<u32>(most);
    }

    // Collect the values of a chunk whose magnitude is at least found.least.
    SL_INLINE static void pick_from(const float* acc, Candidates& found) {
        int n = 0;
        for (int i = 0; i < CHUNK; ++i) {
            const u32 bits = bits_of(acc[i]);
            found.bits[n] = bits;
            found.indices[n] = static_cast<u16>(i);
            n += (bits & MAGNITUDE) >= found.least;
        }
        found.count = n;
    }

    // How many values have a magnitude of at least each of three limits.
    SL_INLINE static void count_from(const u32* values, int padded, const u32* limits, int* counts) {
        for (int c = 0; c < 3; ++c) {
            const i32 limit = static_cast<i32>(limits[c]);
            int count = 0;
            for (int i = 0; i < padded; ++i) count += static_cast<i32>(values[i] & MAGNITUDE) >= limit;
            counts[c] = count;
        }
    }

    SL_INLINE static void count_from(const u16* values, int padded, const u32* limits, int* counts) {
        for (int c = 0; c < 3; ++c) {
            const i16 limit = static_cast<i16>(limits[c]);
            u16 count = 0;
            for (int i = 0; i < padded; ++i) count = static_cast<u16>(count + (static_cast<i16>(values[i]) >= limit));
            counts[c] = count;
        }
    }

    // Keep the candidates whose magnitude is at least `least`.
    SL_INLINE static void keep_from(Candidates& candidates, u32 least) {
        int kept = 0;
        for (int i = 0; i < candidates.count; ++i) {
            const u32 bits = candidates.bits[i];
            candidates.indices[kept] = candidates.indices[i];
            candidates.bits[kept] = bits;
            kept += (bits & MAGNITUDE) >= least;
        }
        candidates.count = kept;
        candidates.least = least;
    }

    // Write the gaps between 17 indices, of which the first stands before the pointer; false where one takes more than
    // a byte.
    SL_INLINE static bool write_short_gaps(const u16* indices, u8* to) {
        int longest = 0;
        for (int i = 0; i < GAP_RUN; ++i) longest = std::max(longest, indices[i] - indices[i - 1] - 1);
        if (longest >= 255) return false;
        for (int i = 0; i < GAP_RUN; ++i) to[i] = static_cast<u8>(indices[i] - indices[i - 1] - 1);
        return true;
    }

    // Take out the sums that are not 0, with their indices, and leave zeros.
    template <class Sum>
    SL_INLINE static int collect(Sum* sums, Sum* found, u16* indices) {
        int n = 0;
        for (int i = 0; i < CHUNK; ++i) {
            found[n] = sums[i];
            indices[n] = static_cast<u16>(i);
            n += sums[i] != 0;
            sums[i] = 0;
        }
        return n;
    }

    SL_INLINE static void drop_zeros(i8* values, u16* indices, int n) {
        int kept = 0;
        for (int i = 0; i < n; ++i) {
            values[kept] = values[i];
            indices[kept] = indices[i];
            kept += values[i] != 0;
        }
    }
};

int compress_portable(const ChunkInput& in, int chunks, CompressScratch& scratch, ChunkOutput& out) {
    return compress_batch<Portable>(in, chunks, scratch, out);
}

void merge_portable(Source* sources, int count, i64 chunk, const MergePlan& plan, MergeScratch& scratch,
                    MergeOutput& out) {
    merge_chunk<Portable>(sources, count, chunk, plan, scratch, out);
}

const u8* walk_portable(const u8* at, const u8* end, int count, i64& reached) {
    return walk_gaps(at, end, count, reached);
}

#if defined(__x86_64__)

#define SL_AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))
#define SL_AVX512 \
    __attribute__((target("avx2,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")))

// For each set of lanes of eight, the numbers of these lanes, and behind them whatever.
struct LaneTable {
    u8 lanes[256][8];

    constexpr LaneTable() : lanes() {
        for (int set = 0; set < 256; ++set) {
            int n = 0;
            for (u8 lane = 0; lane < 8; ++lane) {
                if (set >> lane & 1) lanes[set][n++] = lane;
            }
        }
    }
};

constexpr LaneTable LANE_TABLE;

struct Avx2 : Portable {
    // For lanes of 16 bits the numbers of their bytes, as a shuffle wants them.
    SL_AVX2 static inline __m128i byte_pairs(__m128i lanes) {
        const __m128i first = _mm_slli_epi16(_mm_cvtepu8_epi16(lanes), 1);
        return _mm_add_epi16(_mm_or_si128(first, _mm_slli_epi16(first, 8)), _mm_set1_epi16(0x0100));
    }

    // Append the lanes of a vector whose magnitude is above a limit, and return their new number.
    SL_AVX2 static inline int append(__m256i bits, __m256i magnitudes, __m256i below, int i, int n, Candidates& found) {
        const int set = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(magnitudes, below)));
        const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(LANE_TABLE.lanes[set]));
        const __m256i packed = _mm256_permutevar8x32_epi32(bits, _mm256_cvtepu8_epi32(lanes));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(found.bits + n), packed);
        const __m128i indices = _mm_add_epi16(_mm_cvtepu8_epi16(lanes), _mm_set1_epi16(static_cast<short>(i)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(found.indices + n), indices);
        return n + __builtin_popcount(static_cast<u32>(set));
    }

    SL_AVX2 static u32 feedback(const ChunkInput& in, int rows, u16* maxima, Candidates& found) {
        const __m256 beta = _mm256_set1_ps(in.beta);
        const __m256i magnitude = _mm256_set1_epi32(MAGNITUDE);
        const __m256i below = _mm256_set1_epi32(static_cast<i32>(found.least - 1));
        __m256i most = _mm256_setzero_si256();
        int n = 0;
        for (int group = 0; group < CHUNK; group += 8 * rows) {
            __m256i block = _mm256_setzero_si256();
            for (int i = group; i < group + 8 * rows; i += 8) {
                const __m256 difference = _mm256_sub_ps(_mm256_loadu_ps(in.outer + i), _mm256_loadu_ps(in.local + i));
                const __m256 kept_back = _mm256_mul_ps(beta, _mm256_loadu_ps(in.residual + i));
                const __m256 acc = _mm256_add_ps(kept_back, difference);
                _mm256_storeu_ps(in.residual + i, acc);
                const __m256i bits = _mm256_castps_si256(acc);
                const __m256i magnitudes = _mm256_and_si256(bits, magnitude);
                block = _mm256_max_epu32(block, magnitudes);
                n = append(bits, magnitudes, below, i, n, found);
            }
            const __m256i upper = _mm256_srli_epi32(block, 16);
            const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
            _mm_store_si128(reinterpret_cast<__m128i*>(maxima + group / rows), packed);
            most = _mm256_max_epu32(most, block);
        }
        found.count = n;
        alignas(32) u32 lanes[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
        return *std::max_element(lanes, lanes + 8);
    }

    SL_AVX2 static void pick_from(const float* acc, Candidates& found) {
        const __m256i magnitude = _mm256_set1_epi32(MAGNITUDE);
        const __m256i below = _mm256_set1_epi32(static_cast<i32>(found.least - 1));
        int n = 0;
        for (int i = 0; i < CHUNK; i += 8) {
            const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(acc + i));
            n = append(bits, _mm256_and_si256(bits, magnitude), below, i, n, found);
        }
        found.count = n;
    }

    SL_AVX2 static void count_from(const u32* values, int padded, const u32* limits, int* counts) {
        const __m256i magnitude = _mm256_set1_epi32(MAGNITUDE);
        const __m256i below_1 = _mm256_set1_epi32(static_cast<i32>(limits[0] - 1));
        const __m256i below_2 = _mm256_set1_epi32(static_cast<i32>(limits[1] - 1));
        const __m256i below_3 = _mm256_set1_epi32(static_cast<i32>(limits[2] - 1));
        __m256i sum_1 = _mm256_setzero_si256();
        __m256i sum_2 = sum_1;
        __m256i sum_3 = sum_1;
        for (int i = 0; i < padded; i += 8) {
            const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(values + i));
            const __m256i magnitudes = _mm256_and_si256(bits, magnitude);
            sum_1 = _mm256_sub_epi32(sum_1, _mm256_cmpgt_epi32(magnitudes, below_1));
            sum_2 = _mm256_sub_epi32(sum_2, _mm256_cmpgt_epi32(magnitudes, below_2));
            sum_3 = _mm256_sub_epi32(sum_3, _mm256_cmpgt_epi32(magnitudes, below_3));
        }
        const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(sum_1, sum_2), _mm256_hadd_epi32(sum_3, sum_3));
        const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        counts[0] = _mm_extract_epi32(sums, 0);
        counts[1] = _mm_extract_epi32(sums, 1);
        counts[2] = _mm_extract_epi32(sums, 2);
    }

    SL_AVX2 static void count_from(const u16* values, int padded, const u32* limits, int* counts) {
        const __m256i below_1 = _mm256_set1_epi16(static_cast<i16>(limits[0] - 1));
        const __m256i below_2 = _mm256_set1_epi16(static_cast<i16>(limits[1] - 1));
        const __m256i below_3 = _mm256_set1_epi16(static_cast<i16>(limits[2] - 1));
        __m256i sum_1 = _mm256_setzero_si256();
        __m256i sum_2 = sum_1;
        __m256i sum_3 = sum_1;
        for (int i = 0; i < padded; i += 16) {
            const __m256i maxima = _mm256_load_si256(reinterpret_cast<const __m256i*>(values + i));
            sum_1 = _mm256_sub_epi16(sum_1, _mm256_cmpgt_epi16(maxima, below_1));
            sum_2 = _mm256_sub_epi16(sum_2, _mm256_cmpgt_epi16(maxima, below_2));
            sum_3 = _mm256_sub_epi16(sum_3, _mm256_cmpgt_epi16(maxima, below_3));
        }
        const __m256i one = _mm256_set1_epi16(1);
        sum_1 = _mm256_madd_epi16(sum_1, one);
        sum_2 = _mm256_madd_epi16(sum_2, one);
        sum_3 = _mm256_madd_epi16(sum_3, one);
        const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(sum_1, sum_2), _mm256_hadd_epi32(sum_3, sum_3));
        const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        counts[0] = _mm_extract_epi32(sums, 0);
        counts[1] = _mm_extract_epi32(sums, 1);
        counts[2] = _mm_extract_epi32(sums, 2);
    }

    SL_AVX2 static void keep_from(Candidates& candidates, u32 least) {
        const __m256i magnitude = _mm256_set1_epi32(MAGNITUDE);
        const __m256i below = _mm256_set1_epi32(static_cast<i32>(least - 1));
        int kept = 0;
        for (int i = 0; i < candidates.count; i += 8) {  // behind the last candidate the bits are 0
            const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(candidates.bits + i));
            const __m128i indices = _mm_load_si128(reinterpret_cast<const __m128i*>(candidates.indices + i));
            const __m256i large = _mm256_cmpgt_epi32(_mm256_and_si256(bits, magnitude), below);
            const int set = _mm256_movemask_ps(_mm256_castsi256_ps(large));
            const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(LANE_TABLE.lanes[set]));
            const __m256i packed = _mm256_permutevar8x32_epi32(bits, _mm256_cvtepu8_epi32(lanes));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(candidates.bits + kept), packed);
            const __m128i places = _mm_shuffle_epi8(indices, byte_pairs(lanes));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(candidates.indices + kept), places);
            kept += __builtin_popcount(static_cast<u32>(set));
        }
        candidates.count = kept;
        candidates.least = least;
    }

    SL_AVX2 static inline bool write_short_gaps(const u16* indices, u8* to) {
        const __m256i here = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices));
        const __m256i before = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices - 1));
        const __m256i gaps = _mm256_sub_epi16(_mm256_sub_epi16(here, before), _mm256_set1_epi16(1));
        if (_mm256_movemask_epi8(_mm256_cmpgt_epi16(gaps, _mm256_set1_epi16(254))) != 0) return false;
        const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(gaps), _mm256_extracti128_si256(gaps, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
        return true;
    }

    SL_AVX2 static void drop_zeros(i8* values, u16* indices, int n) {
        int kept = 0;
        for (int i = 0; i < n; i += 8) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values + i));
            const __m128i places = _mm_loadu_si128(reinterpret_cast<const __m128i*>(indices + i));
            const int present = n - i >= 8 ? 0xff : (1 << (n - i)) - 1;
            const int set = ~_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128())) & present;
            const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(LANE_TABLE.lanes[set]));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(values + kept), _mm_shuffle_epi8(bytes, lanes));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(indices + kept), _mm_shuffle_epi8(places, byte_pairs(lanes)));
            kept += __builtin_popcount(static_cast<u32>(set));
        }
    }

    using Portable::collect;

    SL_AVX2 static int collect(Narrow* sums, Narrow* found, u16* indices) {
        const __m256i zero = _mm256_setzero_si256();
        int n = 0;
        for (int i = 0; i < CHUNK; i += 8) {
            const __m256i sum = _mm256_load_si256(reinterpret_cast<const __m256i*>(sums + i));
            const int set = 0xff ^ _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(sum, zero)));
            const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(LANE_TABLE.lanes[set]));
            const __m256i packed = _mm256_permutevar8x32_epi32(sum, _mm256_cvtepu8_epi32(lanes));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(found + n), packed);
            const __m128i places = _mm_add_epi16(_mm_cvtepu8_epi16(lanes), _mm_set1_epi16(static_cast<short>(i)));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(indices + n), places);
            _mm256_store_si256(reinterpret_cast<__m256i*>(sums + i), zero);
            n += __builtin_popcount(static_cast<u32>(set));
        }
        return n;
    }
};

SL_AVX2 int compress_avx2(const ChunkInput& in, int chunks, CompressScratch& scratch, ChunkOutput& out) {
    return compress_batch<Avx2>(in, chunks, scratch, out);
}

SL_AVX2 void merge_avx2(Source* sources, int count, i64 chunk, const MergePlan& plan, MergeScratch& scratch,
                        MergeOutput& out) {
    merge_chunk<Avx2>(sources, count, chunk, plan, scratch, out);
}

SL_AVX2 const u8* walk_avx2(const u8* at, const u8* end, int count, i64& reached) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i sums = zero;
    while (count >= 32 && end - at >= 32) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        const int full = _mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_set1_epi8(-1)));
        const int ends = 32 - __builtin_popcount(static_cast<u32>(full));
        sums = _mm256_add_epi64(sums, _mm256_sad_epu8(bytes, zero));
        reached += ends;
        count -= ends;
        at += 32;
    }
    alignas(32) i64 lanes[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums);
    reached += lanes[0] + lanes[1] + lanes[2] + lanes[3];
    return walk_gaps(at, end, count, reached);
}

struct Avx512 : Avx2 {
    // Append the lanes of a vector in a set, and return the new number of candidates.
    SL_AVX512 static inline int append(__mmask16 set, __m512i bits, __m256i indices, int n, Candidates& found) {
        // To compress inside a register and to store all of it is faster than to store compressed.
        _mm512_storeu_si512(found.bits + n, _mm512_maskz_compress_epi32(set, bits));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(found.indices + n), _mm256_maskz_compress_epi16(set, indices));
        return n + __builtin_popcount(set);
    }

    SL_AVX512 static inline __m256i first_indices() {
        return _mm256_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    }

    SL_AVX512 static u32 feedback(const ChunkInput& in, int rows, u16* maxima, Candidates& found) {
        const __m512 beta = _mm512_set1_ps(in.beta);
        const __m512i magnitude = _mm512_set1_epi32(MAGNITUDE);
        const __m512i least = _mm512_set1_epi32(static_cast<i32>(found.least));
        const __m256i step = _mm256_set1_epi16(16);
        __m256i indices = first_indices();
        __m512i most = _mm512_setzero_si512();
        int n = 0;
        for (int group = 0; group < CHUNK; group += 16 * rows) {
            __m512i block = _mm512_setzero_si512();
            for (int i = group; i < group + 16 * rows; i += 16) {
                const __m512 difference = _mm512_sub_ps(_mm512_loadu_ps(in.outer + i), _mm512_loadu_ps(in.local + i));
                const __m512 kept_back = _mm512_mul_ps(beta, _mm512_loadu_ps(in.residual + i));
                const __m512 acc = _mm512_add_ps(kept_back, difference);
                _mm512_storeu_ps(in.residual + i, acc);
                const __m512i bits = _mm512_castps_si512(acc);
                const __m512i magnitudes = _mm512_and_si512(bits, magnitude);
                block = _mm512_max_epu32(block, magnitudes);
                n = append(_mm512_cmpge_epu32_mask(magnitudes, least), bits, indices, n, found);
                indices = _mm256_add_epi16(indices, step);
            }
            const __m256i upper = _mm512_cvtepi32_epi16(_mm512_srli_epi32(block, 16));
            _mm256_store_si256(reinterpret_cast<__m256i*>(maxima + group / rows), upper);
            most = _mm512_max_epu32(most, block);
        }
        found.count = n;
        return _mm512_reduce_max_epu32(most);
    }

    SL_AVX512 static void pick_from(const float* acc, Candidates& found) {
        const __m512i magnitude = _mm512_set1_epi32(MAGNITUDE);
        const __m512i limit = _mm512_set1_epi32(static_cast<i32>(found.least));
        const __m256i step = _mm256_set1_epi16(16);
        __m256i indices = first_indices();
        int n = 0;
        for (int i = 0; i < CHUNK; i += 16) {
            const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(acc + i));
            n = append(_mm512_cmpge_epu32_mask(_mm512_and_si512(bits, magnitude), limit), bits, indices, n, found);
            indices = _mm256_add_epi16(indices, step);
        }
        found.count = n;
    }

    SL_AVX512 static void count_from(const u32* values, int padded, const u32* limits, int* counts) {
        const __m512i magnitude = _mm512_set1_epi32(MAGNITUDE);
        const __m512i least_1 = _mm512_set1_epi32(static_cast<i32>(limits[0]));
        const __m512i least_2 = _mm512_set1_epi32(static_cast<i32>(limits[1]));
        const __m512i least_3 = _mm512_set1_epi32(static_cast<i32>(limits[2]));
        counts[0] = counts[1] = counts[2] = 0;
        for (int i = 0; i < padded; i += 16) {
            const __m512i magnitudes = _mm512_and_si512(_mm512_load_si512(values + i), magnitude);
            counts[0] += __builtin_popcount(_mm512_cmpge_epu32_mask(magnitudes, least_1));
            counts[1] += __builtin_popcount(_mm512_cmpge_epu32_mask(magnitudes, least_2));
            counts[2] += __builtin_popcount(_mm512_cmpge_epu32_mask(magnitudes, least_3));
        }
    }

    SL_AVX512 static void count_from(const u16* values, int padded, const u32* limits, int* counts) {
        const __m512i least_1 = _mm512_set1_epi16(static_cast<i16>(limits[0]));
        const __m512i least_2 = _mm512_set1_epi16(static_cast<i16>(limits[1]));
        const __m512i least_3 = _mm512_set1_epi16(static_cast<i16>(limits[2]));
        counts[0] = counts[1] = counts[2] = 0;
        for (int i = 0; i < padded; i += 32) {
            const __m512i maxima = _mm512_load_si512(values + i);
            counts[0] += __builtin_popcount(_mm512_cmpge_epi16_mask(maxima, least_1));
            counts[1] += __builtin_popcount(_mm512_cmpge_epi16_mask(maxima, least_2));
            counts[2] += __builtin_popcount(_mm512_cmpge_epi16_mask(maxima, least_3));
        }
    }

    SL_AVX512 static void keep_from(Candidates& candidates, u32 least) {
        const __m512i magnitude = _mm512_set1_epi32(MAGNITUDE);
        const __m512i limit = _mm512_set1_epi32(static_cast<i32>(least));
        int kept = 0;
        for (int i = 0; i < candidates.count; i += 16) {  // behind the last candidate the bits are 0
            const __m512i bits = _mm512_load_si512(candidates.bits + i);
            const __m256i indices = _mm256_load_si256(reinterpret_cast<const __m256i*>(candidates.indices + i));
            const __mmask16 large = _mm512_cmpge_epu32_mask(_mm512_and_si512(bits, magnitude), limit);
            kept = append(large, bits, indices, kept, candidates);
        }
        candidates.count = kept;
        candidates.least = least;
    }

    SL_AVX512 static int collect(Narrow* sums, Narrow* found, u16* indices) {
        const __m256i step = _mm256_set1_epi16(16);
        __m256i here = first_indices();
        int n = 0;
        for (int i = 0; i < CHUNK; i += 16) {
            const __m512i sum = _mm512_load_si512(sums + i);
            const __mmask16 set = _mm512_test_epi32_mask(sum, sum);
            _mm512_storeu_si512(found + n, _mm512_maskz_compress_epi32(set, sum));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(indices + n), _mm256_maskz_compress_epi16(set, here));
            _mm512_store_si512(sums + i, _mm512_setzero_si512());
            n += __builtin_popcount(set);
            here = _mm256_add_epi16(here, step);
        }
        return n;
    }

    SL_AVX512 static int collect(Packed* sums, Packed* found, u16* indices) {
        const __m128i step = _mm_set1_epi16(8);
        __m128i here = _mm_set_epi16(7, 6, 5, 4, 3, 2, 1, 0);
        int n = 0;
        for (int i = 0; i < CHUNK; i += 8) {
            const __m512i sum = _mm512_load_si512(sums + i);
            const __mmask8 set = _mm512_test_epi64_mask(sum, sum);
            _mm512_storeu_si512(found + n, _mm512_maskz_compress_epi64(set, sum));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(indices + n), _mm_maskz_compress_epi16(set, here));
            _mm512_store_si512(sums + i, _mm512_setzero_si512());
            n += __builtin_popcount(set);
            here = _mm_add_epi16(here, step);
        }
        return n;
    }

    SL_AVX512 static void drop_zeros(i8* values, u16* indices, int n) {
        int kept = 0;
        for (int i = 0; i < n; i += 32) {
            const u32 lanes = n - i >= 32 ? ~u32{0} : (u32{1} << (n - i)) - 1;
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
            const __m512i places = _mm512_loadu_si512(indices + i);
            const u32 set = _mm256_test_epi8_mask(bytes, bytes) & lanes;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + kept), _mm256_maskz_compress_epi8(set, bytes));
            _mm512_storeu_si512(indices + kept, _mm512_maskz_compress_epi16(set, places));
            kept += __builtin_popcount(set);
        }
    }
};

SL_AVX512 int compress_avx512(const ChunkInput& in, int chunks, CompressScratch& scratch, ChunkOutput& out) {
    return compress_batch<Avx512>(in, chunks, scratch, out);
}

SL_AVX512 void merge_avx512(Source* sources, int count, i64 chunk, const MergePlan& plan, MergeScratch& scratch,
                            MergeOutput& out) {
    merge_chunk<Avx512>(sources, count, chunk, plan, scratch, out);
}

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("popcnt");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}

#endif

struct Isa {
    const char* name;
    int (*compress)(const ChunkInput&, int, CompressScratch&, ChunkOutput&);
    void (*merge)(Source*, int, i64, const MergePlan&, MergeScratch&, MergeOutput&);
    Walk walk;
};

constexpr Isa ISAS[] = {
    {"portable", compress_portable, merge_portable, walk_portable},
#if defined(__x86_64__)
    {"AVX2", compress_avx2, merge_avx2, walk_avx2},
    {"AVX-512", compress_avx512, merge_avx512, walk_avx2},
#endif
};

// How many of ISAS this machine has; each includes those before it.
int isas_here() {
#if defined(__x86_64__)
    return has_avx512() ? 3 : has_avx2() ? 2 : 1;
#else
    return 1;
#endif
}

std::atomic<int> isa_wanted{-1};

const Isa& isa() {
    static const int best = isas_here() - 1;
    const int wanted = isa_wanted.load(std::memory_order_relaxed);
    return ISAS[wanted < 0 ? best : wanted];
}

Walk walk_here() { return isa().walk; }

// ---------------------------------------------------------------------------------------------------------------------
// Whole tensors

// Cut `units` into one range for each thread and work on all of them. Where no thread can be started, this one does it.
template <class Work>
void in_ranges(int ranges, i64 units, Work work) {
    const auto run = [=](int range) {
        const DefaultArithmetic arithmetic;
        work(range, units * range / ranges, units * (range + 1) / ranges);
    };
    std::vector<std::thread> threads;
    threads.reserve(static_cast<std::size_t>(ranges));
    for (int range = 1; range < ranges; ++range) {
        try {
            threads.emplace_back(run, range);
        } catch (...) {
            run(range);
        }
    }
    run(0);
    for (std::thread& thread : threads) thread.join();
}

int ranges_for(int threads, i64 units) {
    return static_cast<int>(std::clamp<i64>(threads, 1, std::max<i64>(units, 1)));
}

// What a range has written, into its own part of the output.
struct Written {
    u8* gaps;
    i64 gap_bytes;
    u8* values;
    i64 value_count;
    int status;
};

struct CompressJob {
    PacketForm form;
    float* residual;
    const float* outer;
    const float* local;
    float beta;
    u8* scales;
    u8* ratios;
    u32* blocks;
    u8* gaps;
    u8* codes;
    i64* positions;
    float* originals;
};

// The last chunk of a tensor. Zeros behind it are never chosen before a real value: they are the smallest there can be,
// with the highest indices.
int compress_short(ChunkInput in, int length, CompressScratch& scratch, ChunkOutput& out) {
    const std::size_t bytes = static_cast<std::size_t>(length) * sizeof(float);
    std::memset(scratch.short_chunk, 0, sizeof scratch.short_chunk);
    std::memcpy(scratch.short_chunk[0], in.residual, bytes);
    std::memcpy(scratch.short_chunk[1], in.outer, bytes);
    std::memcpy(scratch.short_chunk[2], in.local, bytes);
    float* const residual = in.residual;
    in.residual = scratch.short_chunk[0];
    in.outer = scratch.short_chunk[1];
    in.local = scratch.short_chunk[2];
    const int status = isa().compress(in, 1, scratch, out);
    std::memcpy(residual, scratch.short_chunk[0], bytes);
    return status;
}

Written compress_range(const CompressJob& job, i64 first, i64 stop, CompressScratch& scratch) {
    const PacketForm& form = job.form;
    const int kept = form.kept_of(CHUNK);
    u8* const gaps = job.gaps + first * PacketForm::gap_bytes_max(kept, CHUNK);
    u8* const codes = job.codes + first * kept * form.code_bits / 8;
    i64* const positions = job.positions + first * kept;
    ChunkOutput out{gaps, BitWriter(codes), positions, job.originals + first * kept, job.scales + first,
                    job.ratios + first};
    for (i64 chunk = first; chunk < stop;) {
        const i64 start = chunk * CHUNK;
        const ChunkInput in{job.residual + start, job.outer + start,  job.local + start, job.beta,
                            form.kept(chunk),     form.code_bits, start};
        const i64 whole = std::min(stop, form.tensor.size / CHUNK) - chunk;
        const int chunks = static_cast<int>(std::clamp<i64>(whole, 1, BATCH));
        const u8* const before = out.gaps;
        const int status = whole > 0 ? isa().compress(in, chunks, scratch, out)
                                     : compress_short(in, form.tensor.length(chunk), scratch, out);
        if (status != OK) return {gaps, 0, codes, 0, status};
        // A block is whole batches. Two threads may share one, and sums do not mind in which order.
        __atomic_fetch_add(&job.blocks[chunk / BLOCK_CHUNKS], static_cast<u32>(out.gaps - before), __ATOMIC_RELAXED);
        chunk += chunks;
    }
    out.codes.finish();
    return {gaps, out.gaps - gaps, codes, out.positions - positions, OK};
}

// Close the holes that absent chunks left between the ranges.
void join_ranges(const CompressJob& job, const std::vector<Written>& ranges, i64 sizes[3]) {
    i64 gap_bytes = ranges[0].gap_bytes;
    i64 values = ranges[0].value_count;
    const int bits = job.form.code_bits;
    BitWriter codes(job.codes);
    for (std::size_t r = 0; r < ranges.size(); ++r) {
        const Written& range = ranges[r];
        const u8* const end = range.values + (range.value_count * bits + 7) / 8;
        for (i64 left = range.value_count * bits, bit = 0; left > 0; left -= 56, bit += 56) {
            const int n = static_cast<int>(std::min<i64>(left, 56));
            codes.push(bits_at(range.values, end, bit) & ((u64{1} << n) - 1), n);
        }
    }
    const u8* const end = codes.finish();
    const int kept = job.form.kept_of(CHUNK);
    for (std::size_t r = 1; r < ranges.size(); ++r) {
        const Written& range = ranges[r];
        const i64 from = (range.gaps - job.gaps) / PacketForm::gap_bytes_max(kept, CHUNK) * kept;
        const std::size_t count = static_cast<std::size_t>(range.value_count);
        std::memmove(job.gaps + gap_bytes, range.gaps, static_cast<std::size_t>(range.gap_bytes));
        std::memmove(job.positions + values, job.positions + from, count * sizeof(i64));
        std::memmove(job.originals + values, job.originals + from, count * sizeof(float));
        gap_bytes += range.gap_bytes;
        values += range.value_count;
    }
    sizes[0] = values;
    sizes[1] = gap_bytes;
    sizes[2] = end - job.codes;
}

int compress_tensor(const CompressJob& job, int threads, i64 sizes[3]) {
    // Eight chunks of codes end on a byte, so ranges of whole eights do not share one.
    const i64 eights = (job.form.tensor.chunks() + 7) / 8;
    const int ranges = ranges_for(threads, eights / 4);
    std::vector<std::unique_ptr<CompressScratch>> scratch;
    for (int r = 0; r < ranges; ++r) scratch.emplace_back(new CompressScratch);
    std::vector<Written> written(static_cast<std::size_t>(ranges));
    in_ranges(ranges, eights, [&](int range, i64 first, i64 stop) {
        const std::size_t r = static_cast<std::size_t>(range);
        written[r] = compress_range(job, first * 8, std::min(stop * 8, job.form.tensor.chunks()), *scratch[r]);
    });
    for (const Written& range : written) {
        if (range.status != OK) return range.status;
    }
    join_ranges(job, written, sizes);
    return OK;
}

struct MergeJob {
    MergePlan plan;
    std::vector<Source> sources;  // at the start of their sections
    u16* counts;
    u8* exponents;
    u32* blocks;
    u8* gaps;
    u8* values;
};

// Move all sources from the start of their sections to a block of chunks.
void seek(const MergePlan& plan, std::vector<Source>& sources, i64 block) {
    for (Source& source : sources) {
        source.gaps = source.section.gaps;
        for (i64 b = 0; b < block; ++b) source.gaps += load<u32>(source.section.blocks + 4 * b);
        i64 present = 0;
        for (i64 chunk = 0; chunk < block * BLOCK_CHUNKS; ++chunk) present += source.section.scales[chunk] != 0;
        source.bit = present * plan.form.kept_of(CHUNK) * plan.form.code_bits;
    }
}

Written merge_blocks(const MergeJob& job, i64 first, i64 stop, std::vector<Source>& sources, MergeScratch& scratch) {
    u8* const gaps = job.gaps + first * BLOCK_CHUNKS * CHUNK;
    u8* const values = job.values + first * BLOCK_CHUNKS * CHUNK;
    MergeOutput out{0, 0, gaps, values};
    seek(job.plan, sources, first);
    for (i64 block = first; block < stop; ++block) {
        const u8* const before = out.gaps;
        const i64 chunk_stop = std::min<i64>(job.plan.form.tensor.chunks(), (block + 1) * BLOCK_CHUNKS);
        for (i64 chunk = block * BLOCK_CHUNKS; chunk < chunk_stop; ++chunk) {
            isa().merge(sources.data(), static_cast<int>(sources.size()), chunk, job.plan, scratch, out);
            job.counts[chunk] = static_cast<u16>(out.count);
            job.exponents[chunk] = static_cast<u8>(out.exponent);
        }
        job.blocks[block] = static_cast<u32>(out.gaps - before);
    }
    return {gaps, out.gaps - gaps, values, out.values - values, OK};
}

void merge_tensor(const MergeJob& job, int threads, i64 sizes[2]) {
    const i64 blocks = job.plan.form.tensor.blocks();
    const int ranges = ranges_for(threads, blocks);
    std::vector<std::vector<Source>> sources(static_cast<std::size_t>(ranges), job.sources);
    std::vector<std::unique_ptr<MergeScratch>> scratch;
    for (int r = 0; r < ranges; ++r) scratch.emplace_back(new MergeScratch());
    std::vector<Written> written(static_cast<std::size_t>(ranges));
    in_ranges(ranges, blocks, [&](int range, i64 first, i64 stop) {
        const std::size_t r = static_cast<std::size_t>(range);
        written[r] = merge_blocks(job, first, stop, sources[r], *scratch[r]);
    });
    sizes[0] = sizes[1] = 0;
    for (const Written& range : written) {
        std::memmove(job.values + sizes[0], range.values, static_cast<std::size_t>(range.value_count));
        std::memmove(job.gaps + sizes[1], range.gaps, static_cast<std::size_t>(range.gap_bytes));
        sizes[0] += range.value_count;
        sizes[1] += range.gap_bytes;
    }
}

// Subtract the values of some blocks from the outer parameters. The section has passed all checks.
void step_blocks(float* outer, Tensor tensor, const UpdateSection& section, i64 first, i64 stop) {
    const u8* at = section.gaps;
    for (i64 block = 0; block < first; ++block) at += load<u32>(section.blocks + 4 * block);
    const i8* value = reinterpret_cast<const i8*>(section.values);
    for (i64 chunk = 0; chunk < first * BLOCK_CHUNKS; ++chunk) value += section.count(chunk);
    const i64 chunk_stop = std::min<i64>(tensor.chunks(), stop * BLOCK_CHUNKS);
    for (i64 chunk = first * BLOCK_CHUNKS; chunk < chunk_stop; ++chunk) {
        float* place = outer + chunk * CHUNK - 1;
        constexpr float GRID = 1.0f / (u64{1} << GRID_BITS);
        const float unit = static_cast<float>(u64{1} << section.exponents[chunk]) * GRID;
        for (int left = section.count(chunk); left > 0; --left) {
            int byte = *at++;
            while (byte == 255) {
                place += 255;
                byte = *at++;
            }
            place += byte + 1;
            *place -= static_cast<float>(*value++) * unit;  // the product is exact: seven bits times a power of two
        }
    }
}

bool form_is_good(const PacketForm& form) {
    return form.tensor.size >= 1 && form.tensor.size <= i64{1} << 31 && form.k >= 1 && form.k <= CHUNK &&
           (form.code_bits == 1 || form.code_bits == 2);
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// The C ABI. Pointers are never null unless a length is 0; arrays have the lengths that native.py gives them.

// Use the instruction set of this number, or the best for -1. Returns false where the machine does not have it.
SL_EXPORT int sl_set_isa(i32 wanted) {
    if (wanted >= isas_here()) return 0;
    isa_wanted.store(wanted, std::memory_order_relaxed);
    return 1;
}

// The name of the instruction set in use.
SL_EXPORT const char* sl_isa() { return isa().name; }

// sizes: number of values, of gap bytes and of code bytes written.
SL_EXPORT int sl_compress(float* residual, const float* outer, const float* local, i64 size, float beta, i32 k,
                          i32 code_bits, i32 threads, u8* scales, u8* ratios, u32* blocks, u8* gaps, u8* codes,
                          i64* positions, float* originals, i64* sizes) {
    const PacketForm form{{size}, k, code_bits};
    if (!form_is_good(form)) return MISUSE;
    std::fill(blocks, blocks + form.tensor.blocks(), 0u);
    const CompressJob job{form,   residual, outer, local, beta,      scales,
                          ratios, blocks,   gaps,  codes, positions, originals};
    try {
        return compress_tensor(job, threads, sizes);
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}

// sizes: number of gap bytes and of code bytes written. MISUSE where the arrays do not belong together.
SL_EXPORT int sl_encode(const u8* scales, const i64* indices, const u8* codes, i64 count, i64 size, i32 k,
                        i32 code_bits, u32* blocks, u8* gaps, u8* packed, i64* sizes) {
    const PacketForm form{{size}, k, code_bits};
    if (!form_is_good(form) || count != count_values(form, scales)) return MISUSE;
    std::fill(blocks, blocks + form.tensor.blocks(), 0u);
    BitWriter writer(packed);
    u8* to = gaps;
    u16 inside[CHUNK];
    for (i64 chunk = 0; chunk < form.tensor.chunks(); ++chunk) {
        if (scales[chunk] == 0) continue;
        const int kept = form.kept(chunk);
        i64 previous = chunk * CHUNK - 1;
        for (int i = 0; i < kept; ++i) {
            if (indices[i] <= previous || indices[i] >= chunk * CHUNK + form.tensor.length(chunk)) return MISUSE;
            previous = indices[i];
            inside[i] = static_cast<u16>(previous - chunk * CHUNK);
            writer.push(codes[i] & ((1u << code_bits) - 1), code_bits);
        }
        u8* const end = write_gaps<Portable>(inside, kept, to);
        blocks[chunk / BLOCK_CHUNKS] += static_cast<u32>(end - to);
        to = end;
        indices += kept;
        codes += kept;
    }
    sizes[0] = to - gaps;
    sizes[1] = writer.finish() - packed;
    return OK;
}

// values: how many the section has. Returns the code of the first rule of SPEC 5 that is broken.
SL_EXPORT int sl_check_section(const u8* data, i64 length, i64 size, i32 k, i32 code_bits, i64* values) {
    const PacketForm form{{size}, k, code_bits};
    if (!form_is_good(form)) return MISUSE;
    PacketSection section;
    const int code = check_packet_section(data, length, form, section);
    if (code == OK) *values = section.values;
    return code;
}

// values: how many the section has. Returns the code of the first rule of SPEC 7 that is broken.
SL_EXPORT int sl_check_update_section(const u8* data, i64 length, i64 size, i64* values) {
    if (!form_is_good({{size}, 1, 1})) return MISUSE;
    UpdateSection section;
    const int code = check_whole_update_section(data, length, {size}, section);
    if (code == OK) *values = section.value_count;
    return code;
}

// sizes: number of values and of gap bytes written. A section that breaks a rule is refused with its code.
SL_EXPORT int sl_merge(const u8* const* sections, const i64* lengths, const i64* weights, const i64* clips, i32 count,
                       i64 size, i32 k, i32 code_bits, i32 by_senders, i64 total_weight, i64 alpha_q16, i32 threads,
                       u16* counts, u8* exponents, u32* blocks, u8* gaps, u8* values, i64* sizes) {
    const PacketForm form{{size}, k, code_bits};
    if (!form_is_good(form) || count < 1 || count > 1024 || alpha_q16 < 1 || alpha_q16 > 1 << 18) return MISUSE;
    try {
        MergeJob job{{form, by_senders != 0, total_weight, alpha_q16, 0}, {}, counts, exponents, blocks, gaps, values};
        i64 sum = 0;
        i64 all_weights = total_weight;
        for (int r = 0; r < count; ++r) {
            if (weights[r] < 1 || weights[r] > 4096 || clips[r] < 1 || clips[r] > 65536) return MISUSE;
            Source source{};
            if (const int code = check_packet_section(sections[r], lengths[r], form, source.section)) return code;
            source.weight = weights[r];
            source.clip = clips[r];
            sum += weights[r];
            all_weights |= weights[r];
            job.sources.push_back(source);
        }
        if (total_weight < sum || total_weight > 1024 * 4096) return MISUSE;  // a mean is below its largest value
        job.plan.weight_zeros = __builtin_ctzll(static_cast<u64>(all_weights));
        merge_tensor(job, threads, sizes);
        return OK;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}

// Checks the whole section before it changes anything.
SL_EXPORT int sl_outer_step(float* outer, i64 size, const u8* data, i64 length, i32 threads) {
    if (!form_is_good({{size}, 1, 1})) return MISUSE;
    const Tensor tensor{size};
    UpdateSection section;
    if (const int code = check_whole_update_section(data, length, tensor, section)) return code;
    try {
        in_ranges(ranges_for(threads, tensor.blocks()), tensor.blocks(),
                  [&](int, i64 first, i64 stop) { step_blocks(outer, tensor, section, first, stop); });
        return OK;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}

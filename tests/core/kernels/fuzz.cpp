// Feed every decoder of kernels.cpp with mutated sections: ./fuzz SEED MUTATIONS SECONDS
//
// Meant to be built together with kernels.cpp under AddressSanitizer and UBSan. Each array lies in a heap block of just its
// size, so that a read or write beyond it ends the program. So does a breach of what must hold: every instruction set
// gives the same answer, a merge and an outer step refuse what the check refuses and with its code, a refused update
// changes nothing, what a merge writes passes the check, and no call takes a second.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i32 = std::int32_t;
using i64 = std::int64_t;

extern "C" {
int sl_set_isa(i32 wanted);
int sl_compress(float* residual, const float* outer, const float* local, i64 size, float beta, i32 k, i32 code_bits,
                i32 threads, u8* scales, u8* ratios, u32* blocks, u8* gaps, u8* codes, i64* positions, float* originals,
                i64* sizes);
int sl_check_section(const u8* data, i64 length, i64 size, i32 k, i32 code_bits, i64* values);
int sl_check_update_section(const u8* data, i64 length, i64 size, i64* values);
int sl_merge(const u8* const* sections, const i64* lengths, const i64* weights, const i64* clips, i32 count, i64 size,
             i32 k, i32 code_bits, i32 by_senders, i64 total_weight, i64 alpha_q16, i32 threads, u16* counts,
             u8* exponents, u32* blocks, u8* gaps, u8* values, i64* sizes);
int sl_outer_step(float* outer, i64 size, const u8* data, i64 length, i32 threads);
}

namespace {

using Bytes = std::vector<u8>;

constexpr int CHUNK = 4096;
constexpr int BLOCK_CHUNKS = 1024;
constexpr int ISAS = 3;
constexpr double SLOWEST_S = 1.0;

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "does not hold: %s\n", what);
    std::abort();
}

// A heap block of just this many values; the sanitizer watches both ends.
template <class T>
std::unique_ptr<T[]> block(i64 count) {
    return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(count)]);
}

std::unique_ptr<u8[]> copy(const Bytes& bytes) {
    auto to = block<u8>(static_cast<i64>(bytes.size()));
    std::copy(bytes.begin(), bytes.end(), to.get());
    return to;
}

template <class T>
void append(Bytes& to, const T* from, i64 count) {
    const u8* bytes = reinterpret_cast<const u8*>(from);
    to.insert(to.end(), bytes, bytes + count * static_cast<i64>(sizeof(T)));
}

struct Random {
    std::mt19937_64 engine;

    u64 below(u64 bound) { return engine() % bound; }
    i64 between(i64 low, i64 high) { return low + static_cast<i64>(below(static_cast<u64>(high - low + 1))); }
    bool one_in(u64 n) { return below(n) == 0; }
    template <class T>
    T of(std::initializer_list<T> choices) {
        return choices.begin()[below(choices.size())];
    }
};

// What a section is for.
struct Form {
    i64 size;
    int k;
    int code_bits;

    i64 chunks() const { return (size + CHUNK - 1) / CHUNK; }
    i64 blocks() const { return (chunks() + BLOCK_CHUNKS - 1) / BLOCK_CHUNKS; }
};

// Valid sections of one form, and valid updates of its size: what mutations start from.
struct Family {
    Form form;
    std::vector<Bytes> packets;
    std::vector<Bytes> updates;
};

class Fuzzer {
   public:
    explicit Fuzzer(u64 seed) : random_{std::mt19937_64(seed)} {
        for (int isa = 0; isa < ISAS; ++isa) isas_ += sl_set_isa(isa);
        for (const i64 size : {1, 2, 63, 64, 65, 300, 4095, 4096, 4097, 8192, 12293, 40000}) {
            for (int i = 0; i < 3; ++i) add_family(size);
        }
        large_ = families_.size();
        for (const i64 size : {1025 * CHUNK, 2048 * CHUNK + 5}) add_family(size);
    }

    void run(u64 mutations, double seconds) {
        const std::time_t end = std::time(nullptr) + static_cast<std::time_t>(seconds);
        for (; mutations_ < mutations && (mutations_ % 256 != 0 || std::time(nullptr) < end); ++mutations_) {
            // Sections of several blocks are rare because they are slow.
            const std::size_t which = random_.one_in(500) ? large_ + random_.below(families_.size() - large_) : random_.below(large_);
            Family& family = families_[which];
            if (random_.one_in(2)) {
                mutate_packet(family);
            } else {
                mutate_update(family);
            }
        }
    }

    void print() const {
        std::printf("instruction sets: %d\nmutations: %llu\naccepted: %llu\n", isas_, static_cast<unsigned long long>(mutations_),
                    static_cast<unsigned long long>(accepted_));
        for (const auto& [code, count] : refused_) std::printf("refused %d: %llu\n", code, static_cast<unsigned long long>(count));
        std::printf("calls: %llu\n", static_cast<unsigned long long>(calls_));
        for (const auto& [name, took] : slowest_s_) {
            std::printf("slowest %s: %.0f us\n", name.c_str(), took * 1e6);
            require(took < SLOWEST_S, "no call takes a second");
        }
    }

   private:
    // Call, and note how long it took. What seems slow is called again, because other work on the machine delays calls too.
    template <class Call>
    int timed(const char* name, Call call) {
        double& slowest_s = slowest_s_[name];
        double took_s = SLOWEST_S;
        int status = 0;
        for (int turn = 0; turn < 5 && took_s > slowest_s; ++turn) {
            const auto before = std::chrono::steady_clock::now();
            status = call();
            took_s = std::min(took_s, std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count());
        }
        slowest_s = std::max(slowest_s, took_s);
        ++calls_;
        require(status >= 0, "a decoder ends with success or with the code of a rule");
        return status;
    }

    void any_isa() { sl_set_isa(static_cast<i32>(random_.below(static_cast<u64>(isas_)))); }

    // Values of one kind a chunk: those of training, and those that no training makes but a peer may hold.
    std::unique_ptr<float[]> floats(i64 size) {
        auto values = block<float>(size);
        float scale = 0;
        int kind = 0;
        for (i64 i = 0; i < size; ++i) {
            if (i % CHUNK == 0) {
                kind = static_cast<int>(random_.below(8));
                scale = std::ldexp(1.0f, static_cast<int>(random_.between(-45, 10)));
            }
            const u32 bits = static_cast<u32>(random_.engine());
            const float uniform = static_cast<float>(static_cast<i32>(bits)) * 0x1p-31f;
            float value = uniform * uniform * uniform * scale;
            if (kind == 1) value = bits & 1 ? scale : -scale;  // ties
            if (kind == 2) value = bits & 1 ? 0.0f : -0.0f;
            if (kind == 3) value = uniform * 1e-39f;  // denormals
            if (kind == 4) value = uniform * 1e38f;
            if (kind == 5) value = bits % 100 == 0 ? uniform : 0.0f;
            values[i] = value;
        }
        return values;
    }

    Bytes compressed(const Form& form) {
        const i64 chunks = form.chunks();
        const i64 kept = form.k;  // of a whole chunk; a short one keeps no more
        auto residual = floats(form.size);
        auto outer = floats(form.size);
        auto local = floats(form.size);
        auto scales = block<u8>(chunks);
        auto ratios = block<u8>(chunks);
        auto blocks = block<u32>(form.blocks());
        auto gaps = block<u8>(chunks * (kept + (CHUNK - kept) / 255));
        auto codes = block<u8>((chunks * kept * form.code_bits + 7) / 8);
        auto positions = block<i64>(chunks * kept);
        auto originals = block<float>(chunks * kept);
        i64 sizes[3];
        any_isa();
        const float beta = random_.of({0.0f, 0.5f, 0.95f, 1.0f});
        const i32 threads = random_.of({1, 3});
        const int status = sl_compress(residual.get(), outer.get(), local.get(), form.size, beta, form.k, form.code_bits,
                                       threads, scales.get(), ratios.get(), blocks.get(), gaps.get(), codes.get(),
                                       positions.get(), originals.get(), sizes);
        require(status == 0, "finite values are compressed");
        Bytes section;
        append(section, scales.get(), chunks);
        if (form.code_bits == 2) append(section, ratios.get(), chunks);
        append(section, blocks.get(), form.blocks() - 1);
        append(section, gaps.get(), sizes[1]);
        append(section, codes.get(), sizes[2]);
        return section;
    }

    void add_family(i64 size) {
        const bool is_large = size > BLOCK_CHUNKS * CHUNK;
        const int k = is_large ? random_.of({1, 2}) : random_.of({1, 7, 64, 128, 257, 1000, 4096});
        Family family{{size, k, random_.of({1, 2})}, {}, {}};
        for (int i = 0; i < (is_large ? 2 : 4); ++i) {
            family.packets.push_back(compressed(family.form));
            require(check(family.packets.back(), family.form) == 0, "what compress writes passes the check");
        }
        for (int i = 0; i < (is_large ? 1 : 3); ++i) {
            require(merge(family.packets, family) == 0, "valid sections are merged");
        }
        families_.push_back(std::move(family));
    }

    int check(const Bytes& bytes, const Form& form) {
        const auto data = copy(bytes);
        const i64 length = static_cast<i64>(bytes.size());
        int codes[ISAS];
        i64 values[ISAS] = {};
        for (int isa = 0; isa < isas_; ++isa) {
            sl_set_isa(isa);
            codes[isa] = timed("check", [&] {
                return sl_check_section(data.get(), length, form.size, form.k, form.code_bits, &values[isa]);
            });
            require(codes[isa] == codes[0] && values[isa] == values[0], "all instruction sets check alike");
        }
        return codes[0];
    }

    int check_update(const Bytes& bytes, const Form& form) {
        const auto data = copy(bytes);
        const i64 length = static_cast<i64>(bytes.size());
        int codes[ISAS];
        i64 values[ISAS] = {};
        for (int isa = 0; isa < isas_; ++isa) {
            sl_set_isa(isa);
            codes[isa] = timed("check of an update", [&] {
                return sl_check_update_section(data.get(), length, form.size, &values[isa]);
            });
            require(codes[isa] == codes[0] && values[isa] == values[0], "all instruction sets check alike");
        }
        return codes[0];
    }

    // Merge, and let the update join the family's when all sections are valid.
    int merge(const std::vector<Bytes>& packets, Family& family) {
        const Form& form = family.form;
        const i64 count = static_cast<i64>(packets.size());
        std::vector<std::unique_ptr<u8[]>> copies;
        auto sections = block<const u8*>(count);
        auto lengths = block<i64>(count);
        auto weights = block<i64>(count);
        auto clips = block<i64>(count);
        i64 total = random_.of({0, 0, 77});
        for (i64 r = 0; r < count; ++r) {
            copies.push_back(copy(packets[static_cast<std::size_t>(r)]));
            sections[r] = copies.back().get();
            lengths[r] = static_cast<i64>(packets[static_cast<std::size_t>(r)].size());
            weights[r] = random_.one_in(2) ? 1024 : random_.between(1, 4096);
            clips[r] = random_.one_in(2) ? 65536 : random_.between(1, 65536);
            total += weights[r];
        }
        auto counts = block<u16>(form.chunks());
        auto exponents = block<u8>(form.chunks());
        auto blocks = block<u32>(form.blocks());
        auto gaps = block<u8>(form.size);
        auto values = block<u8>(form.size);
        i64 sizes[2];
        any_isa();
        const i32 by_senders = static_cast<i32>(random_.below(2));
        const i64 alpha = random_.of<i64>({1, 65536, 50000, 1 << 18});
        const i32 threads = random_.of({1, 3});
        const int status = timed("merge", [&] {
            return sl_merge(sections.get(), lengths.get(), weights.get(), clips.get(), static_cast<i32>(count), form.size,
                            form.k, form.code_bits, by_senders, total, alpha, threads, counts.get(), exponents.get(),
                            blocks.get(), gaps.get(), values.get(), sizes);
        });
        if (status != 0) return status;
        Bytes section;
        append(section, counts.get(), form.chunks());
        append(section, exponents.get(), form.chunks());
        append(section, blocks.get(), form.blocks() - 1);
        append(section, gaps.get(), sizes[1]);
        append(section, values.get(), sizes[0]);
        require(check_update(section, form) == 0, "what a merge writes passes the check");
        if (family.updates.size() < 8) {
            family.updates.push_back(section);
        } else {
            family.updates[random_.below(family.updates.size())] = section;
        }
        return 0;
    }

    int outer_step(const Bytes& bytes, const Form& form) {
        const auto data = copy(bytes);
        auto outer = block<float>(form.size);
        const bool is_small = form.size <= 65536;
        if (is_small) {
            for (i64 i = 0; i < form.size; ++i) outer[i] = static_cast<float>(i + 1);
        }
        any_isa();
        const i32 threads = random_.of({1, 3});
        const int status = timed("outer step", [&] {
            return sl_outer_step(outer.get(), form.size, data.get(), static_cast<i64>(bytes.size()), threads);
        });
        for (i64 i = 0; status != 0 && is_small && i < form.size; ++i) {
            require(outer[i] == static_cast<float>(i + 1), "a refused update changes nothing");
        }
        return status;
    }

    void count(int code) {
        if (code == 0) {
            ++accepted_;
        } else {
            ++refused_[code];
        }
    }

    void mutate_packet(Family& family) {
        Form form = family.form;
        const Bytes bytes = mutated(family.packets, form, form.code_bits);
        if (random_.one_in(16)) {  // read with what another run or tensor would have
            form.size = std::max<i64>(1, form.size + random_.of<i64>({-CHUNK, -1, 1, CHUNK}));
            form.k = random_.of({form.k, 1, 64, 4096});
            form.code_bits = random_.of({1, 2});
            count(check(bytes, form));
            return;
        }
        const int code = check(bytes, form);
        count(code);
        std::vector<Bytes> packets = {bytes};
        while (random_.one_in(2)) packets.push_back(family.packets[random_.below(family.packets.size())]);
        std::swap(packets.front(), packets.back());
        require(merge(packets, family) == code, "a merge refuses what the check refuses");
    }

    void mutate_update(Family& family) {
        Form form = family.form;
        const Bytes bytes = mutated(family.updates, form, 3);
        if (random_.one_in(16)) form.size = std::max<i64>(1, form.size + random_.of<i64>({-CHUNK, -1, 1, CHUNK}));
        const int code = check_update(bytes, form);
        count(code);
        require(outer_step(bytes, form) == code, "an outer step refuses what the check refuses");
    }

    // A valid section with a few changes. A chunk has `table_bytes` in the tables.
    Bytes mutated(const std::vector<Bytes>& from, const Form& form, i64 table_bytes) {
        const std::size_t blocks = static_cast<std::size_t>(form.chunks() * table_bytes);
        const std::size_t gaps = blocks + static_cast<std::size_t>(4 * (form.blocks() - 1));
        Bytes bytes = from[random_.below(from.size())];
        for (u64 left = 1 + (random_.one_in(3) ? random_.below(4) : 0); left > 0; --left) {
            if (bytes.empty()) bytes.push_back(0);
            const std::size_t first = random_.one_in(4) ? blocks : 0;  // where gap bytes are stated, if they are
            const std::size_t stop = random_.one_in(2) ? gaps + 16 : bytes.size();
            const std::size_t at = first + random_.below(std::max<std::size_t>(stop, first + 1) - first);
            mutate(bytes, from[random_.below(from.size())], std::min(at, bytes.size() - 1));
        }
        return bytes;
    }

    // One change of one kind at this place.
    void mutate(Bytes& bytes, const Bytes& other, std::size_t at) {
        const std::size_t length = 1 + random_.below(std::min<std::size_t>(bytes.size() - at, random_.one_in(4) ? 5000 : 8));
        const auto here = bytes.begin() + static_cast<std::ptrdiff_t>(at);
        const auto stop = here + static_cast<std::ptrdiff_t>(length);
        const u8 extreme = random_.of<u8>({0, 1, 2, 3, 35, 36, 63, 64, 127, 128, 254, 255});
        switch (random_.below(10)) {
            case 0: *here ^= static_cast<u8>(1u << random_.below(8)); break;
            case 1: *here = extreme; break;
            case 2: std::fill(here, stop, extreme); break;
            case 3: bytes.resize(at); break;
            case 4: bytes.insert(here, length, extreme); break;
            case 5: bytes.erase(here, stop); break;
            case 6: {  // one index moves, those behind it stay
                const std::size_t to = random_.below(bytes.size());
                const u8 step = static_cast<u8>(1 + random_.below(4));
                bytes[at] = static_cast<u8>(bytes[at] + step);
                bytes[to] = static_cast<u8>(bytes[to] - step);
                break;
            }
            case 7: {  // a number that promises more than there is, or less
                const u32 number = random_.of<u32>({0, 1, 0xffffffff, 0x80000000, 0x10001000, static_cast<u32>(bytes.size())});
                std::memcpy(&*here, &number, std::min<std::size_t>(4, bytes.size() - at));
                break;
            }
            case 8: {  // splice
                bytes.resize(at);
                if (at < other.size()) bytes.insert(bytes.end(), other.begin() + static_cast<std::ptrdiff_t>(at), other.end());
                break;
            }
            default: {  // a piece of the other section in the same place
                for (std::size_t i = at; i < at + length && i < other.size(); ++i) bytes[i] = other[i];
            }
        }
    }

    Random random_;
    int isas_ = 0;
    std::vector<Family> families_;
    std::size_t large_ = 0;
    u64 mutations_ = 0;
    u64 accepted_ = 0;
    u64 calls_ = 0;
    std::map<int, u64> refused_;
    std::map<std::string, double> slowest_s_;  // by kind of call
};

}  // namespace

int main(int argc, char** argv) {
    require(argc == 4, "the arguments are SEED MUTATIONS SECONDS");
    Fuzzer fuzzer(std::strtoull(argv[1], nullptr, 10));
    fuzzer.run(std::strtoull(argv[2], nullptr, 10), std::strtod(argv[3], nullptr));
    fuzzer.print();
    return 0;
}

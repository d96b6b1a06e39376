// The dialect formats on CPU: quantizer, decoder and linear layer behind a plain C interface.
//
// Numbers follow docs/format.md: quantized bytes, and in accumulation `exact` every output bit, are
// those of reference.py, whatever the instruction set, batch and thread count. The book's tables
// come from formatbook.py through `Book`; this file holds no format data of its own.
//
// How the integer product ("dialect") runs on AVX2, for 8 output rows and one block of 32:
//
//     codes of rows p and p+4  ->  one register: row p in the low, row p+4 in the high half
//     low nibbles, high nibbles ->  pshufb with each half's own dialect: 16 half-units + 16 each
//     one token:
//         x: even elements, odd elements (rearranged once a call) -> broadcast to both halves
//         maddubs(even) + maddubs(odd), madd, pack, madd, pack, madd -> 8 block sums, rows in order
//     several tokens:
//         4 x 4 dwords transposed -> 8 registers, each with 4 elements of all 8 rows; done once
//         8 times maddubs with 4 elements of x, broadcast to all rows; madd -> 8 block sums
//         with AVX-512: two groups of 8 rows in one register, vpdpbusd, up to 16 tokens at a time
//         with AMX: the same panel is a matrix tile; tdpbssd makes 16 x 16 block sums at once
//     minus 16 * sum(x), to float32, times 2^-(deltas), added to 8 float32 accumulators
//
// Half-units are stored + 16 because maddubs wants one unsigned operand. No sum leaves int16.
// "fp8": an E4M3 number is an integer of 18 bits times 2^-9, here three signed digits of 8 bits; the
// same product for each digit, put together as an exact int32. "none" is defined in float64, where
// the product of a float32 and a half-unit is exact, elements ascending. Where a token's numbers are
// integers of at most 22 bits on each block's own power of two, as bfloat16 nearly always is, float64
// rounds nothing and three digits give the same; other tokens are multiplied in float64, 16 rows side
// by side.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <cstdlib>
#endif
#include <unistd.h>

// Portable functions that are compiled a second time inside an AVX2 function.
#define INLINE __attribute__((always_inline)) inline

#if defined(__x86_64__)
#include <immintrin.h>
#define DIALECT_X86 1
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX2_INLINE __attribute__((target("avx2,fma"), always_inline)) inline
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
// Where the compiler has a header for AMX, its assembler knows it too.
#if defined(__linux__) && (__has_include(<amxint8intrin.h>) || __has_include(<amxintrin.h>))
#include <cpuid.h>
#include <sys/syscall.h>
#define DIALECT_AMX 1
#endif
#endif

extern "C" {

// Tables of one formatbook; the same layout as _Book in __init__.py.
struct Book {
    int32_t dialects;              // 16 or 32: any id that fits into id_bits
    int32_t id_bits;
    int32_t variants;              // dialects per largest half-unit M
    uint8_t thresholds[32][7];
    uint8_t steps[32][7];          // half-unit i+1 minus half-unit i
    uint8_t index[32][32];         // [dialect][cell]
    int8_t half_units[32][16];     // [dialect][code], signed
    uint8_t online_cost[8][4][32]; // [15 - M][variant][cell]; the smallest sum wins
};

// Element types, rules, activation formats and instruction sets as numbers.
enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum Rule : int32_t { EXACT_ERROR = 0, ONLINE = 1 };
enum Format : int32_t { DIALECT = 0, FP8 = 1, NONE = 2 };
enum Features : int32_t { SCALAR = 0, AVX2_FMA = 1, AVX512_VNNI = 2, AMX_INT8 = 3 };

// A packed weight [rows, columns]; `padded` columns are stored.
struct Weight {
    const uint8_t* codes;
    const uint8_t* meta;
    const int8_t* row_exponent;
    int64_t rows;
    int64_t columns;
    int32_t block;
};

}  // extern "C"

namespace {

constexpr int kWindow = 13;            // deltas 14 and 15 are read as this
constexpr int kLowestExponent = -120;
constexpr int kNanRow = -128;
constexpr int kCells = 32;
constexpr int kTile = 96;              // tokens that share one decoded panel of weights
constexpr int kSmallestTile = 32;      // below, decoding the panel would cost too much of the time
constexpr int kTileStep = 16;          // tokens that AVX-512 and AMX work on together
constexpr int64_t kTileBytes = 1 << 19;
constexpr int kBlocksPerException = 32;  // of a token that is multiplied in integers, at least
constexpr int kNeighbours = 16;        // groups of rows in one task, where there are enough
constexpr int kLanes = 16;             // rows handled together by the float64 product
constexpr uint32_t kInfinity = 0x7f800000u;

// ---- numbers -----------------------------------------------------------------------------------

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// 2^exponent for -126..127.
INLINE float power_of_two(int exponent) { return float_of(uint32_t(exponent + 127) << 23); }

// 2^exponent for -1022..1023.
double double_power_of_two(int exponent) {
    const uint64_t bits = uint64_t(exponent + 1023) << 52;
    double x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE float from_half(uint16_t half) {
    const uint32_t exponent = half & 0x7c00, shifted = uint32_t(half & 0x7fff) << 13;
    const uint32_t normal = shifted + (112u << 23) + (exponent == 0x7c00 ? 112u << 23 : 0);
    const uint32_t subnormal = bits_of(float(int(half & 0x3ff)) * 0x1p-24f);
    return float_of(uint32_t(half & 0x8000) << 16 | (exponent ? normal : subnormal));
}

uint16_t to_half(float x) {
    const uint32_t bits = bits_of(x);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > kInfinity) return sign | 0x7e00;
    if (magnitude >= 0x47800000u) return sign | 0x7c00;  // 2^16
    if (magnitude < 0x38800000u)  // 2^-14: adding 0.5 rounds to multiples of 2^-24
        return sign | uint16_t(bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
    magnitude += 0xfff + (magnitude >> 13 & 1);
    return sign | uint16_t((magnitude - (112u << 23)) >> 13);
}

uint16_t to_bfloat16(float x) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > kInfinity) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Copies `count` elements as float32 and pads with zeros up to `padded`.
INLINE void load_row(const void* x, int dtype, int64_t offset, int64_t count, int64_t padded,
                     float* out) {
    if (dtype == FLOAT32) {
        if (count) std::memcpy(out, static_cast<const float*>(x) + offset, count * sizeof(float));
    } else if (dtype == BFLOAT16) {
        const uint16_t* from = static_cast<const uint16_t*>(x) + offset;
        for (int64_t i = 0; i < count; i++) out[i] = float_of(uint32_t(from[i]) << 16);
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(x) + offset;
        for (int64_t i = 0; i < count; i++) out[i] = from_half(from[i]);
    }
    std::fill(out + count, out + padded, 0.0f);
}

void store(void* y, int dtype, int64_t at, float value) {
    if (dtype == FLOAT32)
        static_cast<float*>(y)[at] = value;
    else
        static_cast<uint16_t*>(y)[at] = dtype == BFLOAT16 ? to_bfloat16(value) : to_half(value);
}

// Largest magnitude as float bits (they are ordered like the magnitudes).
INLINE uint32_t largest_bits(const float* x, int64_t count) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; i++)
        largest = std::max(largest, int32_t(bits_of(x[i]) & 0x7fffffffu));
    return uint32_t(largest);
}

// Nearest E4M3 value, ties to even, of a float in -448..448.
INLINE float round_to_e4m3(float x) {
    const uint32_t bits = bits_of(x);
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude < 0x3c800000u) {  // 2^-6: adding 2^14 rounds to multiples of 2^-9
        const float rounded = (float_of(magnitude) + 0x1p14f) - 0x1p14f;
        magnitude = bits_of(rounded);
    } else {
        magnitude = (magnitude + 0x7ffff + (magnitude >> 20 & 1)) & ~0xfffffu;
    }
    return float_of(magnitude | (bits & 0x80000000u));
}

// ---- threads -----------------------------------------------------------------------------------
//
// Work is shared by the threads of PyTorch's OpenMP runtime where that is possible: they are on the
// CPUs that an engine has chosen, and they still spin after PyTorch's last operation, so that threads
// of our own would have to share the CPUs with them. It is not possible without such a runtime, in a
// forked process (where its threads are gone), and where its threads have all been pinned to fewer
// CPUs than there are threads. Then a pool of our own does the work.

using Task = void (*)(const void* context, int64_t i);

// `count` tasks that any number of threads take from.
struct Job {
    Job(Task task, const void* context, int64_t count)
        : task(task), context(context), count(count) {}
    void take() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
            task(context, i);
    }
    const Task task;
    const void* const context;
    const int64_t count;
    std::atomic<int64_t> next{0};
};

#if defined(__linux__)
struct CpuMask {
    unsigned long bits[128] = {};  // 8192 CPUs

    static CpuMask of(int thread) {  // 0: of the caller; empty if it cannot be told
        CpuMask mask;
        if (sched_getaffinity(thread, sizeof mask.bits, reinterpret_cast<cpu_set_t*>(mask.bits)))
            return CpuMask();
        return mask;
    }
    void add(const CpuMask& other) {
        for (size_t i = 0; i < 128; i++) bits[i] |= other.bits[i];
    }
    void remove(const CpuMask& other) {
        for (size_t i = 0; i < 128; i++) bits[i] &= ~other.bits[i];
    }
    int count() const {
        int found = 0;
        for (unsigned long word : bits) found += __builtin_popcountl(word);
        return found;
    }
};

// GOMP_parallel: calls a function on so many threads, the caller among them, and waits for all.
using Region = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
std::atomic<Region> openmp{nullptr};
std::atomic<int> openmp_owner{0};

// The CPUs of the OpenMP threads that serve the calling thread.
CpuMask cpus_of_openmp(Region region, int threads) {
    struct Found {
        std::mutex lock;
        CpuMask mask;
    } found;
    region(
        [](void* context) {
            Found& all = *static_cast<Found*>(context);
            const CpuMask own = CpuMask::of(0);
            std::lock_guard<std::mutex> one(all.lock);
            all.mask.add(own);
        },
        &found, threads, 0);
    return found.mask;
}

// The OpenMP runtime if it has a CPU for each of the threads; every calling thread asks once.
Region openmp_for(int threads) {
    const Region region = openmp.load();
    if (!region || openmp_owner.load() != getpid()) return nullptr;
    thread_local int asked = 0;
    thread_local bool serves = false;
    if (asked != threads) {
        serves = cpus_of_openmp(region, threads).count() >= threads;
        asked = threads;
    }
    return serves ? region : nullptr;
}

// Where helpers may run. A new thread inherits its creator's pin, and an engine may have pinned that
// one to a single core; so helpers get the CPUs of all threads of this process. Where even these are
// fewer than the threads asked for (OpenMP pins the first thread early and starts the others late),
// they get every CPU the system lets this process have.
CpuMask cpus_of_helpers(int threads) {
    CpuMask mask;
    DIR* tasks = opendir("/proc/self/task");
    if (!tasks) return mask;
    while (const dirent* task = readdir(tasks))
        if (const int id = std::atoi(task->d_name)) mask.add(CpuMask::of(id));
    closedir(tasks);
    if (mask.count() < threads) std::memset(mask.bits, 0xff, sizeof mask.bits);
    const CpuMask caller = CpuMask::of(0);
    if (caller.count() == 1 && mask.count() > 1) mask.remove(caller);  // it works there itself
    return mask;
}
#endif

// Threads that stay. Not by a second OpenMP runtime: it would inherit the first one's limits.
class Pool {
  public:
    Pool() : owner_(getpid()) {}

    int owner() const { return owner_; }

    // Does the job on up to `threads` threads, the caller among them.
    void run(int threads, Job& job) {
        std::lock_guard<std::mutex> one_call(call_);
        grow(int(std::min<int64_t>(threads, job.count)) - 1);
        {
            std::lock_guard<std::mutex> lock(state_);
            job_ = &job;
            wanted_ = threads - 1;
            number_++;
        }
        wake_.notify_all();
        job.take();
        std::unique_lock<std::mutex> lock(state_);
        job_ = nullptr;  // a thread that wakes up only now finds nothing to do
        done_.wait(lock, [&] { return active_ == 0; });
    }

  private:
    void grow(int helpers) {
        if (helpers <= size_) return;
#if defined(__linux__)
        CpuMask mask = cpus_of_helpers(helpers + 1);
#endif
        try {
            while (size_ < helpers) {
                std::thread helper([this, number = size_] { serve(number); });
#if defined(__linux__)
                pthread_setname_np(helper.native_handle(), "dialect-helper");
                if (mask.count())
                    pthread_setaffinity_np(helper.native_handle(), sizeof mask.bits,
                                           reinterpret_cast<cpu_set_t*>(mask.bits));
#endif
                helper.detach();
                size_++;
            }
        } catch (const std::system_error&) {
            // no more threads to be had: those that exist share the work
        }
    }

    void serve(int number) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(state_);
        for (;;) {
            wake_.wait(lock, [&] { return number_ != seen; });
            seen = number_;
            if (!job_ || number >= wanted_) continue;
            Job& job = *job_;
            active_++;
            lock.unlock();
            job.take();
            lock.lock();
            if (--active_ == 0) done_.notify_all();
        }
    }

    const int owner_;
    std::mutex call_, state_;
    std::condition_variable wake_, done_;
    int size_ = 0;
    Job* job_ = nullptr;
    int wanted_ = 0, active_ = 0;
    uint64_t number_ = 0;  // of the job
};

// Never destroyed: its threads live as long as the process. After a fork the child has none of
// them (and perhaps a locked mutex), so it starts a pool of its own.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
    Pool* current = the_pool.load();
    if (current && current->owner() == getpid()) return *current;
    Pool* fresh = new Pool;
    if (the_pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;  // another thread was faster
    return *current;
}

// Runs work(i) for i in 0..count-1 on up to `threads` threads, the caller among them.
template <class Work>
void parallel(int threads, int64_t count, const Work& work) {
    const Task task = [](const void* context, int64_t i) {
        (*static_cast<const Work*>(context))(i);
    };
    Job job(task, &work, count);
    if (threads <= 1 || count <= 1) return job.take();
#if defined(__linux__)
    if (const Region region = openmp_for(threads))
        return region([](void* all) { static_cast<Job*>(all)->take(); }, &job, threads, 0);
#endif
    pool().run(threads, job);
}

// ---- rounding ----------------------------------------------------------------------------------

struct RoundedBlock {
    int id;
    int delta;
};

// Cost of a dialect by exact error. With G(k) = k * n - s, where the n elements in cells >= k have
// scaled magnitudes that sum to s = sum 4m, the cost sum h (h - 4m) is sum_i step_i * G(t_i): going
// from half-unit i to i+1 costs step * (t - 4m), for every element at or above the threshold. All
// in units of 2^-23, exact in int64.
template <int B>
INLINE int least_error(const int32_t* fixed, const Book& book) {
    int64_t cells[2][kCells] = {};  // count << 40 | sum; two, so that equal cells do not wait
    for (int i = 0; i < B; i += 2) {
        cells[0][fixed[i] >> 23] += fixed[i] + (int64_t(1) << 40);
        cells[1][fixed[i + 1] >> 23] += fixed[i + 1] + (int64_t(1) << 40);
    }
    int64_t gain[kCells];
    int64_t above = 0;
    for (int k = kCells - 1; k > 0; k--) {
        above += cells[0][k] + cells[1][k];
        gain[k] = (above >> 40) * (int64_t(k) << 23) - (above & ((int64_t(1) << 40) - 1));
    }
    int best = 0;
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int id = 0; id < book.dialects; id++) {
        int64_t cost = 0;
        for (int i = 0; i < 7; i++) cost += book.steps[id][i] * gain[book.thresholds[id][i]];
        if (cost < least) {
            least = cost;
            best = id;
        }
    }
    return best;
}

// What is to be decided about a block's dialect: by a rule, or a variant that its group has chosen.
struct Choice {
    int rule;
    int variant;  // -1: the block decides alone
};

// Index of a block's largest half-unit M, 15 - M.
INLINE int range_index(int largest_cell) {
    return 15 - std::min(15, std::max(8, (largest_cell + 1) >> 1));
}

// What is done to the bytes of a block: one by one or, in functions for AVX2, with shuffles, sixteen at
// a time. The shuffles are text, so that these functions need no target of their own.
template <int B, bool Shuffles>
struct Bytes {
    static constexpr int kChunk = B < 32 ? B : 32;

    static INLINE void take32(const uint8_t* table, const uint8_t* index, uint8_t* out) {
        for (int i = 0; i < B; i++) out[i] = table[index[i]];
    }
    static INLINE void take16(const int8_t* table, const uint8_t* index, int8_t* out) {
        for (int i = 0; i < B; i++) out[i] = table[index[i]];
    }
    // sums[v] is the sum of what tables[v] holds for the bytes.
    template <int V>
    static INLINE void sums32(const uint8_t (*tables)[32], const uint8_t* index, int* sums) {
        for (int v = 0; v < V; v++) {
            sums[v] = 0;
            for (int i = 0; i < B; i++) sums[v] += tables[v][index[i]];
        }
    }
    // The even, then the odd bytes of every 32 (B = 16: 16); returns the sum.
    static INLINE int split(const int8_t* from, int8_t* to) {
        int sum = 0;
        for (int c = 0; c < B; c += kChunk)
            for (int i = 0; i < kChunk / 2; i++) {
                to[c + i] = from[c + 2 * i];
                to[c + kChunk / 2 + i] = from[c + 2 * i + 1];
                sum += to[c + i] + to[c + kChunk / 2 + i];
            }
        return sum;
    }
};

#if DIALECT_X86
template <int B>
struct Bytes<B, true> {
    static INLINE __m128i load(const void* from) { return _mm_loadu_si128((const __m128i*)from); }
    static INLINE void store(void* to, __m128i bytes) { _mm_storeu_si128((__m128i*)to, bytes); }

    static INLINE __m128i shuffle(__m128i table, __m128i index) {
        __m128i out;
        asm("vpshufb %2, %1, %0" : "=x"(out) : "x"(table), "x"(index));
        return out;
    }
    // A shuffle gives 0 where bit 7 of the index is set: each half of a table answers for itself.
    static INLINE __m128i low(__m128i index) { return _mm_add_epi8(index, _mm_set1_epi8(112)); }
    static INLINE __m128i high(__m128i index) { return _mm_sub_epi8(index, _mm_set1_epi8(16)); }

    static INLINE void take32(const uint8_t* table, const uint8_t* index, uint8_t* out) {
        for (int i = 0; i < B; i += 16) {
            const __m128i at = load(index + i);
            store(out + i, _mm_or_si128(shuffle(load(table), low(at)),
                                        shuffle(load(table + 16), high(at))));
        }
    }
    static INLINE void take16(const int8_t* table, const uint8_t* index, int8_t* out) {
        for (int i = 0; i < B; i += 16) store(out + i, shuffle(load(table), load(index + i)));
    }
    static INLINE int sum(__m128i halves) {
        return _mm_cvtsi128_si32(halves) + _mm_cvtsi128_si32(_mm_unpackhi_epi64(halves, halves));
    }
    template <int V>
    static INLINE void sums32(const uint8_t (*tables)[32], const uint8_t* index, int* sums) {
        __m128i halves[V];
        for (int v = 0; v < V; v++) halves[v] = _mm_setzero_si128();
        for (int i = 0; i < B; i += 16) {
            const __m128i at = load(index + i), first = low(at), second = high(at);
            for (int v = 0; v < V; v++) {
                const __m128i found = _mm_or_si128(shuffle(load(tables[v]), first),
                                                   shuffle(load(tables[v] + 16), second));
                halves[v] = _mm_add_epi64(halves[v], _mm_sad_epu8(found, _mm_setzero_si128()));
            }
        }
        for (int v = 0; v < V; v++) sums[v] = sum(halves[v]);
    }
    static INLINE int split(const int8_t* from, int8_t* to) {
        const __m128i even = _mm_set1_epi16(255);
        __m128i halves = _mm_setzero_si128();
        for (int i = 0; i < B; i += 16) {
            const __m128i positive = _mm_xor_si128(load(from + i), _mm_set1_epi8(-128));  // + 128
            halves = _mm_add_epi64(halves, _mm_sad_epu8(positive, _mm_setzero_si128()));
        }
        if constexpr (B == 16) {
            const __m128i all = load(from);
            store(to, _mm_packus_epi16(_mm_and_si128(all, even), _mm_srli_epi16(all, 8)));
        } else {
            for (int c = 0; c < B; c += 32) {
                const __m128i a = load(from + c), b = load(from + c + 16);
                store(to + c, _mm_packus_epi16(_mm_and_si128(a, even), _mm_and_si128(b, even)));
                store(to + c + 16, _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
            }
        }
        return sum(halves) - 128 * B;
    }
};
#endif

// The sum of each variant's costs; it reaches 64 * 121.
template <int B, bool Shuffles>
INLINE void online_costs(const uint8_t* cells, int range, const Book& book, int* sums) {
    const uint8_t(*costs)[32] = book.online_cost[range];
    if (book.variants == 2)
        Bytes<B, Shuffles>::template sums32<2>(costs, cells, sums);
    else
        Bytes<B, Shuffles>::template sums32<4>(costs, cells, sums);
}

template <int B, bool Shuffles>
INLINE int least_online_cost(const uint8_t* cells, int largest_cell, int variant,
                             const Book& book) {
    const int range = range_index(largest_cell);
    if (variant < 0) {
        int sums[4];
        online_costs<B, Shuffles>(cells, range, book, sums);
        variant = 0;
        for (int v = 1; v < book.variants; v++)
            if (sums[v] < sums[variant]) variant = v;
    }
    return book.variants * range + variant;
}

// 4m of a block in units of 2^-23, truncated: exact from 4m = 1 on; below, the element is 0
// everywhere. Returns the largest.
template <int B>
INLINE int32_t to_fixed(const float* x, int effective_exponent, int32_t* fixed) {
    const float scale = power_of_two(2 - effective_exponent);
    for (int i = 0; i < B; i++)
        fixed[i] = int32_t(float_of(bits_of(x[i]) & 0x7fffffffu) * scale * 0x1p23f);
    int32_t largest = 0;
    for (int i = 0; i < B; i++) largest = std::max(largest, fixed[i]);
    return largest;
}

template <int B>
INLINE void to_cells(const int32_t* fixed, uint8_t* cells) {
    for (int i = 0; i < B; i++) cells[i] = uint8_t(fixed[i] >> 23);
}

// Rounds one block of finite values; `codes` gets one byte per element.
template <int B, bool Shuffles>
INLINE RoundedBlock round_block(const float* x, int row_exponent, int exponent, Choice choice,
                                int window, const Book& book, uint8_t* codes) {
    const int delta = std::min(row_exponent - exponent, window);
    int32_t fixed[B];
    const int32_t largest = to_fixed<B>(x, row_exponent - delta, fixed);
    if (largest >> 23 == 0) {
        std::memset(codes, 0, B);
        return {0, 0};
    }
    uint8_t cells[B];
    to_cells<B>(fixed, cells);
    const int id =
        choice.rule == EXACT_ERROR
            ? least_error<B>(fixed, book)
            : least_online_cost<B, Shuffles>(cells, largest >> 23, choice.variant, book);
    Bytes<B, Shuffles>::take32(book.index[id], cells, codes);
    uint8_t signs[B];
    for (int i = 0; i < B; i++) signs[i] = uint8_t(bits_of(x[i]) >> 31 << 3);
    for (int i = 0; i < B; i++) codes[i] |= codes[i] ? signs[i] : 0;
    return {id, delta};
}

INLINE int block_exponent(uint32_t largest) {
    return std::max(int(largest >> 23) - (127 + 2), kLowestExponent);
}

// Exponents of a row's blocks and, as the result, of the row; kNanRow for NaN or Inf.
template <int B>
INLINE int row_exponents(const float* x, int64_t blocks, uint32_t* largest) {
    uint32_t top = 0;
    for (int64_t b = 0; b < blocks; b++) {
        largest[b] = largest_bits(x + b * B, B);
        top = std::max(top, largest[b]);
    }
    return top >= kInfinity ? kNanRow : block_exponent(top);
}

// ---- activations -------------------------------------------------------------------------------

template <class T>
struct Aligned {  // uninitialised, on a cache line
    explicit Aligned(int64_t count)
        : memory(new char[std::max<int64_t>(count, 0) * sizeof(T) + 64]) {}
    T* get() const {
        const uintptr_t at = reinterpret_cast<uintptr_t>(memory.get());
        return reinterpret_cast<T*>((at + 63) / 64 * 64);
    }
    std::unique_ptr<char[]> memory;
};

// Tokens as small signed integers: half-units, or larger integers in three digits of 8 bits.
struct Rounded {
    Rounded(int64_t tokens, int64_t padded, int block, int digits)
        : padded(padded), blocks(padded / block), digits(digits), values(tokens * digits * padded),
          scale(tokens * blocks), offset(tokens * blocks), token_scale(tokens) {}
    int64_t padded, blocks;
    int digits;
    // Every 32 (B = 16: 16) elements are stored as their even, then their odd ones, the order in
    // which the nibbles of the codes come out of the decoder.
    Aligned<int8_t> values;       // [T, digits, Kp], least significant digit first
    Aligned<float> scale;         // [T, Kp/B], of the block relative to the token
    Aligned<int32_t> offset;      // [T, Kp/B], 16 * sum of the block's integers
    Aligned<double> token_scale;  // [T], the value of 1; NaN for a token with NaN or Inf
    // Format "none" only: the tokens that are multiplied in integers, blocks of them whose numbers
    // do not fit, and where those numbers are.
    std::vector<int64_t> order;        // empty: all of them
    std::vector<uint16_t> exceptions;  // [T, Kp/B/16], a bit for each of 16 blocks
    const void* x = nullptr;
    int dtype = FLOAT32;
    int64_t columns = 0;

    // For AVX-512, of tokens number 16g..16g+15: [T/16, digits, Kp/4, 16] groups of four values, and
    // [T/16, Kp/B, 16] scales and offsets, these negative.
    Aligned<int32_t> fours{0}, starts{0};
    Aligned<float> scales{0};
    // For AMX: [T/16, Kp/B, digits, 16, B], zero for tokens that do not exist; and `scales`.
    Aligned<int8_t> tiles{0};

    int64_t token(int64_t i) const { return order.empty() ? i : order[i]; }
    uint32_t exceptions_from(int64_t token, int64_t b) const {  // b is a multiple of 16
        return exceptions.empty() ? 0 : exceptions[token * ((blocks + 15) / 16) + b / 16];
    }
};

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Activations [tokens, columns] and, for each of their blocks, the variant its group has chosen.
struct Tokens {
    const void* x;
    int dtype;
    int64_t columns;
    const int8_t* variants;  // [tokens, blocks], -1 for a free one; or null: all are free

    void load(int64_t token, int64_t padded, float* row) const {
        load_row(x, dtype, token * columns, columns, padded, row);
    }
    Choice choice(int64_t token, int64_t blocks, int64_t b) const {
        return {ONLINE, variants ? variants[token * blocks + b] : -1};
    }
};

// Replaces a row of finite values by the rounded ones, or by what rounding leaves over.
template <int B, bool Shuffles, bool Residual>
INLINE void round_values(const Tokens& tokens, int64_t token, const Book& book, int row_exponent,
                         int64_t blocks, const uint32_t* largest, float* row) {
    for (int64_t b = 0; b < blocks; b++) {
        uint8_t codes[B];
        const RoundedBlock rounded =
            round_block<B, Shuffles>(row + b * B, row_exponent, block_exponent(largest[b]),
                                     tokens.choice(token, blocks, b), kWindow, book, codes);
        int8_t half_units[B];
        Bytes<B, Shuffles>::take16(book.half_units[rounded.id], codes, half_units);
        const float relative = power_of_two(4 - rounded.delta);
        const float scale = power_of_two(row_exponent - 5);
        for (int i = 0; i < B; i++) {
            const float value = float(half_units[i]) * relative * scale;
            row[b * B + i] = Residual ? row[b * B + i] - value : value;
        }
    }
}

template <int B, bool Shuffles>
INLINE void round_row_in(const Tokens& tokens, int64_t token, int64_t padded, const Book& book,
                         float* row, uint32_t* largest, float* out) {
    tokens.load(token, padded, row);
    const int row_exponent = row_exponents<B>(row, padded / B, largest);
    if (row_exponent == kNanRow)
        std::fill_n(row, padded, float(kNan));
    else
        round_values<B, Shuffles, false>(tokens, token, book, row_exponent, padded / B, largest, row);
    std::copy_n(row, tokens.columns, out + token * tokens.columns);
}

template <int B, bool Shuffles>
INLINE void costs_of_row_in(const Tokens& tokens, int64_t token, int64_t padded, const Book& book,
                            float* row, uint32_t* largest, int32_t* out) {
    const int64_t blocks = padded / B;
    tokens.load(token, padded, row);
    const int row_exponent = row_exponents<B>(row, blocks, largest);
    for (int64_t b = 0; b < blocks; b++) {
        int sums[4] = {};
        if (row_exponent != kNanRow) {
            int32_t fixed[B];
            uint8_t cells[B];
            const int delta = std::min(row_exponent - block_exponent(largest[b]), kWindow);
            const int32_t top = to_fixed<B>(row + b * B, row_exponent - delta, fixed);
            to_cells<B>(fixed, cells);
            online_costs<B, Shuffles>(cells, range_index(top >> 23), book, sums);
        }
        std::copy_n(sums, book.variants, out + (token * blocks + b) * book.variants);
    }
}

// Rounds a token, or what rounding it left over, into row `at` of `out`.
template <int B, bool Shuffles>
INLINE void round_token_in(const Tokens& tokens, int64_t token, bool residual, int64_t at,
                           const Book& book, float* row, uint32_t* largest, Rounded& out) {
    tokens.load(token, out.padded, row);
    int row_exponent = row_exponents<B>(row, out.blocks, largest);
    if (residual && row_exponent != kNanRow) {
        round_values<B, Shuffles, true>(tokens, token, book, row_exponent, out.blocks, largest, row);
        row_exponent = row_exponents<B>(row, out.blocks, largest);
    }
    out.token_scale.get()[at] =
        row_exponent == kNanRow ? kNan : double_power_of_two(row_exponent - 1);
    for (int64_t b = 0; b < out.blocks; b++) {
        uint8_t codes[B] = {};
        RoundedBlock rounded = {0, 0};
        const Choice choice =
            residual ? Choice{ONLINE, -1} : tokens.choice(token, out.blocks, b);
        if (row_exponent != kNanRow)
            rounded = round_block<B, Shuffles>(row + b * B, row_exponent,
                                               block_exponent(largest[b]), choice, kWindow, book,
                                               codes);
        int8_t half_units[B];
        Bytes<B, Shuffles>::take16(book.half_units[rounded.id], codes, half_units);
        const int sum =
            Bytes<B, Shuffles>::split(half_units, out.values.get() + at * out.padded + b * B);
        out.scale.get()[at * out.blocks + b] = power_of_two(-rounded.delta);
        out.offset.get()[at * out.blocks + b] = 16 * sum;
    }
}

// Modulo 2^32, as all sums are; only their differences must fit.
INLINE int32_t times_16(int32_t sum) { return int32_t(16 * uint32_t(sum)); }

// Writes a block of integers below 2^22 as signed digits of 8 bits; returns their sum.
template <int B>
INLINE int32_t write_digits(int32_t* integers, int64_t token, int64_t b, Rounded& out) {
    constexpr int kChunk = B < 32 ? B : 32;
    int8_t* values = out.values.get() + token * 3 * out.padded + b * B;
    int32_t sum = 0;
    for (int i = 0; i < B; i++) sum += integers[i];
    for (int digit = 0; digit < 3; digit++)
        for (int i = 0; i < B; i++) {
            const int8_t low = int8_t(integers[i]);
            integers[i] = (integers[i] - low) >> 8;
            const int at = i / kChunk * kChunk + (i & 1) * (kChunk / 2) + i % kChunk / 2;
            values[digit * out.padded + at] = low;
        }
    return sum;
}

template <int B, bool>  // nothing to shuffle
INLINE void digits_of_token_in(const void* x, int dtype, int64_t token, int64_t columns, float* row,
                               Rounded& out) {
    load_row(x, dtype, token * columns, columns, out.padded, row);
    const uint32_t largest = largest_bits(row, columns);
    const bool finite = largest < kInfinity;
    float scale = float_of(largest) / 448.0f;
    if (scale == 0.0f) scale = 1.0f;
    out.token_scale.get()[token] = finite ? double(scale) * 0x1p-9 : kNan;
    for (int64_t b = 0; b < out.blocks; b++, row += B) {
        int32_t integers[B] = {};
        for (int i = 0; i < B && finite; i++) {
            const float quotient = std::min(448.0f, std::max(-448.0f, row[i] / scale));
            integers[i] = int32_t(round_to_e4m3(quotient) * 512.0f);
        }
        out.scale.get()[token * out.blocks + b] = 1.0f;
        out.offset.get()[token * out.blocks + b] = times_16(write_digits<B>(integers, token, b, out));
    }
}

// Format "none" in integers: a block's numbers on a common power of two that makes the largest an
// integer of kBits bits; a block with another number that is no integer then is an exception. Returns
// whether that serves: there are few exceptions, and no number is so large or small that scaling it
// might not be exact.
template <int B, bool>  // nothing to shuffle
INLINE bool integers_of_token_in(const void* x, int dtype, int64_t token, int64_t columns,
                                 float* row, uint32_t* largest, Rounded& out) {
    constexpr int kBits = B == 64 ? 21 : 22;  // 15 * B * 2^kBits fit in int32
    constexpr uint32_t kLeast = (127u - 50) << 23, kTooLarge = (127u + 51) << 23;
    load_row(x, dtype, token * columns, columns, out.padded, row);
    uint32_t top = 0, misfits = 0;
    for (int64_t i = 0; i < out.padded; i++) {
        const uint32_t magnitude = bits_of(row[i]) & 0x7fffffffu;
        misfits += (magnitude != 0) & ((magnitude < kLeast) | (magnitude >= kTooLarge));
    }
    if (misfits) return false;
    for (int64_t b = 0; b < out.blocks; b++) {
        largest[b] = largest_bits(row + b * B, B);
        top = std::max(top, largest[b]);
    }
    const int exponent = top ? int(top >> 23) - 126 - kBits : 0;
    out.token_scale.get()[token] = double_power_of_two(exponent);
    int64_t exceptions = 0;
    for (int64_t b = 0; b < out.blocks; b++) {
        const int own = largest[b] ? int(largest[b] >> 23) - 126 - kBits : exponent;
        const float scale = power_of_two(-own);
        int32_t integers[B];
        int fits = 1;
        for (int i = 0; i < B; i++) {
            const float scaled = row[b * B + i] * scale;
            integers[i] = int32_t(scaled);
            fits &= float(integers[i]) == scaled;
        }
        uint16_t& bits = out.exceptions[token * ((out.blocks + 15) / 16) + b / 16];
        if (b % 16 == 0) bits = 0;
        bits |= uint16_t(!fits << b % 16);
        exceptions += !fits;
        if (exceptions > out.blocks / kBlocksPerException) return false;
        out.scale.get()[token * out.blocks + b] = power_of_two(own - exponent);
        out.offset.get()[token * out.blocks + b] = times_16(write_digits<B>(integers, token, b, out));
    }
    return true;
}

INLINE void widen_token_in(const void* x, int dtype, int64_t token, int64_t columns, int64_t padded,
                           float* row, double* out) {
    load_row(x, dtype, token * columns, columns, padded, row);
    std::copy_n(row, padded, out);
}

// Where a quantized matrix goes; rows of padded / 2 codes and padded / block meta bytes.
struct Packed {
    uint8_t* codes;
    uint8_t* meta;
    int8_t* row_exponent;
    int64_t* below_window;
};

template <int B, bool Shuffles>
INLINE void quantize_row_in(const void* x, int dtype, int64_t row, int64_t columns, int64_t padded,
                            int rule, int window, const Book& book, float* values,
                            uint32_t* largest, const Packed& out) {
    const int64_t blocks = padded / B;
    load_row(x, dtype, row * columns, columns, padded, values);
    const int exponent = row_exponents<B>(values, blocks, largest);
    int64_t below_window = 0;
    for (int64_t b = 0; b < blocks; b++) {
        uint8_t unpacked[B] = {};
        RoundedBlock rounded = {0, 0};
        if (exponent != kNanRow) {
            const int own = block_exponent(largest[b]);
            rounded = round_block<B, Shuffles>(values + b * B, exponent, own, {rule, -1}, window,
                                               book, unpacked);
            below_window += exponent - own > window && largest[b] > 0;
        }
        out.meta[row * blocks + b] = uint8_t(rounded.delta << book.id_bits | rounded.id);
        uint8_t* codes = out.codes + (row * padded + b * B) / 2;
        for (int j = 0; j < B / 2; j++)
            codes[j] = uint8_t(unpacked[2 * j] | unpacked[2 * j + 1] << 4);
    }
    out.row_exponent[row] = int8_t(exponent);
    out.below_window[row] = below_window;
}

// The row functions by block size, compiled for any processor and for AVX2: the same operations.
#define ROW_FUNCTION(result, name, suffix, target, shuffles)               \
    template <class... Rest>                                               \
    target result name##suffix(int block, Rest&&... rest) {                \
        if (block == 16) return name##_in<16, shuffles>(rest...);          \
        if (block == 32) return name##_in<32, shuffles>(rest...);          \
        return name##_in<64, shuffles>(rest...);                           \
    }
#define ROW_FUNCTIONS(suffix, target, shuffles)                            \
    ROW_FUNCTION(void, round_token, suffix, target, shuffles)              \
    ROW_FUNCTION(void, round_row, suffix, target, shuffles)                \
    ROW_FUNCTION(void, costs_of_row, suffix, target, shuffles)             \
    ROW_FUNCTION(void, quantize_row, suffix, target, shuffles)             \
    ROW_FUNCTION(void, digits_of_token, suffix, target, shuffles)          \
    ROW_FUNCTION(bool, integers_of_token, suffix, target, shuffles)        \
    template <class... Rest>                                               \
    target void widen_token##suffix(Rest&&... rest) {                      \
        widen_token_in(rest...);                                           \
    }

ROW_FUNCTIONS(_portable, , false)
#if DIALECT_X86
ROW_FUNCTIONS(_avx2, AVX2, true)
#define BY_FEATURES(function, features, ...)                                        \
    ((features) >= AVX2_FMA ? function##_avx2(__VA_ARGS__) : function##_portable(__VA_ARGS__))
#else
#define BY_FEATURES(function, features, ...) ((void)(features), function##_portable(__VA_ARGS__))
#endif

// ---- weights -----------------------------------------------------------------------------------

struct Reader {
    Reader(const Weight& w, const Book& book)
        : w(w), book(book), padded((w.columns + w.block - 1) / w.block * w.block),
          blocks(padded / w.block), id_mask((1 << book.id_bits) - 1) {
        for (int id = 0; id < 32; id++)
            for (int code = 0; code < 16; code++)
                unsigned_half_units[id][code] = uint8_t(book.half_units[id][code] + 16);
    }
    const uint8_t* codes(int64_t row) const { return w.codes + row * (padded / 2); }
    const uint8_t* meta(int64_t row) const { return w.meta + row * blocks; }
    int id(uint8_t meta) const { return meta & id_mask; }
    int delta(uint8_t meta) const { return std::min(meta >> book.id_bits, kWindow); }

    // The value of one half-unit.
    double block_scale(int64_t row, uint8_t meta) const {
        const int exponent = w.row_exponent[row];
        if (exponent == kNanRow) return kNan;
        return double_power_of_two(std::max(exponent, kLowestExponent) - delta(meta) - 1);
    }

    const Weight& w;
    const Book& book;
    const int64_t padded, blocks;
    const int id_mask;
    alignas(16) uint8_t unsigned_half_units[32][16];  // + 16
};

// Where the outputs go: the last float32 sum, scaled, biased and rounded once.
struct Output {
    void* y;
    int dtype;
    int64_t rows;
    const float* bias;
    const int8_t* row_exponent;

    void put(int64_t token, int64_t row, float value) const {
        if (bias) value += bias[row];
        store(y, dtype, token * rows + row, value);
    }

    double row_scale(int64_t row) const {
        const int exponent = row_exponent[row];
        return exponent == kNanRow ? kNan : double_power_of_two(exponent - 1);
    }

    void put_scaled(int64_t token, int64_t row, float sum, double token_scale) const {
        put(token, row, float(double(sum) * (token_scale * row_scale(row))));
    }
};

// ---- portable products -------------------------------------------------------------------------

void integer_row(const Reader& r, const Rounded& x, const Output& out, int64_t row, int64_t first,
                 int64_t tokens) {
    const int block = r.w.block, half = std::min(block, 32) / 2;
    const uint8_t* meta = r.meta(row);
    for (int64_t t = first; t < first + tokens; t++) {
        float sum = 0.0f;
        for (int64_t b = 0; b < r.blocks; b++) {
            const int8_t* table = r.book.half_units[r.id(meta[b])];
            int32_t block_sum = 0;
            for (int digit = 0; digit < x.digits; digit++) {
                const uint8_t* codes = r.codes(row) + b * block / 2;
                const int8_t* values =
                    x.values.get() + (t * x.digits + digit) * x.padded + b * block;
                int32_t digit_sum = 0;
                for (int c = 0; c < block; c += 2 * half, codes += half, values += 2 * half)
                    for (int j = 0; j < half; j++)
                        digit_sum += table[codes[j] & 15] * values[j] +
                                     table[codes[j] >> 4] * values[half + j];
                block_sum += digit_sum * (1 << 8 * digit);
            }
            const float scale = x.scale.get()[t * x.blocks + b];
            sum += float(block_sum) * (scale * power_of_two(-r.delta(meta[b])));
        }
        out.put_scaled(t, row, sum, x.token_scale.get()[t]);
    }
}

void wide_row(const Reader& r, const double* x, const int64_t* order, const Output& out,
              int64_t row, int64_t first, int64_t tokens) {
    const uint8_t* meta = r.meta(row);
    for (int64_t t = first; t < first + tokens; t++) {
        const double* values = x + t * r.padded;
        const uint8_t* codes = r.codes(row);
        float sum = 0.0f;
        for (int64_t b = 0; b < r.blocks; b++) {
            const int8_t* table = r.book.half_units[r.id(meta[b])];
            double block_sum = 0.0;
            for (int i = 0; i < r.w.block; i += 2, codes++, values += 2) {
                block_sum += values[0] * table[*codes & 15];
                block_sum += values[1] * table[*codes >> 4];
            }
            sum += float(block_sum * r.block_scale(row, meta[b]));
        }
        out.put(order[t], row, sum);
    }
}

// ---- AVX2 products -----------------------------------------------------------------------------
#if DIALECT_X86

// Eight rows that are worked on together. Near the end of a matrix that is no multiple of 8 the group
// moves back, and its first `skip` rows are somebody else's to write.
struct RowGroup {
    RowGroup(const Reader& r, int64_t wanted)
        : first(std::min(wanted, r.w.rows - 8)), skip(int(std::min<int64_t>(8, wanted - first))),
          codes(r.codes(first)), meta(r.meta(first)), stride(r.padded / 2), meta_stride(r.blocks) {}
    int64_t first;
    int skip;
    const uint8_t* codes;
    const uint8_t* meta;
    int64_t stride, meta_stride;
};

// 8 rows of 16 bytes -> columns of 8 bytes: out[i] holds columns 2i and 2i + 1.
AVX2_INLINE void transpose_bytes(const __m128i* rows, __m128i* out) {
    __m128i a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[i] = _mm_unpacklo_epi8(rows[2 * i], rows[2 * i + 1]);      // columns 0..7
        a[i + 4] = _mm_unpackhi_epi8(rows[2 * i], rows[2 * i + 1]);  // columns 8..15
    }
    for (int half = 0; half < 8; half += 4)
        for (int i = 0; i < 2; i++) {
            b[half + i] = _mm_unpacklo_epi16(a[half + 2 * i], a[half + 2 * i + 1]);
            b[half + 2 + i] = _mm_unpackhi_epi16(a[half + 2 * i], a[half + 2 * i + 1]);
        }
    for (int i = 0; i < 8; i += 2) {
        out[i] = _mm_unpacklo_epi32(b[i], b[i + 1]);
        out[i + 1] = _mm_unpackhi_epi32(b[i], b[i + 1]);
    }
}

// The meta bytes of 8 rows and 16 blocks, taken apart: [block][row].
struct BlockMeta {
    alignas(32) float scale[16][8];      // 2^-delta
    alignas(32) uint16_t table[16][8];   // where the dialect's table starts
};

AVX2 void read_meta(const Reader& r, const RowGroup& g, int64_t b, int count, BlockMeta& out) {
    __m128i rows[8], columns[8];
    for (int i = 0; i < 8; i++) {
        const uint8_t* at = g.meta + i * g.meta_stride + b;
        if (count >= 16) {
            rows[i] = _mm_loadu_si128((const __m128i*)at);
        } else {
            alignas(16) uint8_t bytes[16] = {};
            std::memcpy(bytes, at, count);
            rows[i] = _mm_load_si128((const __m128i*)bytes);
        }
    }
    transpose_bytes(rows, columns);
    const __m128i shift = _mm_cvtsi32_si128(r.book.id_bits);
    for (int j = 0; j < 16; j++) {
        const __m128i bytes = j & 1 ? _mm_srli_si128(columns[j / 2], 8) : columns[j / 2];
        const __m256i delta = _mm256_min_epi32(_mm256_srl_epi32(_mm256_cvtepu8_epi32(bytes), shift),
                                               _mm256_set1_epi32(kWindow));
        const __m256i bits =
            _mm256_slli_epi32(_mm256_sub_epi32(_mm256_set1_epi32(127), delta), 23);
        _mm256_store_ps(out.scale[j], _mm256_castsi256_ps(bits));
        const __m128i id = _mm_and_si128(bytes, _mm_set1_epi8(char(r.id_mask)));
        _mm_store_si128((__m128i*)out.table[j], _mm_slli_epi16(_mm_cvtepu8_epi16(id), 4));
    }
}

// Half-units + 16; or Signed, without.
template <bool Signed = false>
AVX2_INLINE __m128i load_table(const Reader& r, int offset) {
    return Signed ? _mm_loadu_si128((const __m128i*)(r.book.half_units[0] + offset))
                  : _mm_load_si128((const __m128i*)(r.unsigned_half_units[0] + offset));
}

// A block of rows p and p+4 as half-units, + 16 unless Signed. For B = 16 one register holds, per
// row, 8 even and 8 odd elements; otherwise two registers per 32 elements hold 16 of each.
template <int B, bool Signed = false>
AVX2_INLINE void decode_pair(const Reader& r, const RowGroup& g, const uint16_t* tables, int p,
                             int64_t b, __m256i* out) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i table =
        _mm256_set_m128i(load_table<Signed>(r, tables[p + 4]), load_table<Signed>(r, tables[p]));
    const uint8_t* low = g.codes + p * g.stride + b * (B / 2);
    const uint8_t* high = low + 4 * g.stride;
    if constexpr (B == 16) {
        const __m256i codes = _mm256_set_m128i(_mm_loadl_epi64((const __m128i*)high),
                                               _mm_loadl_epi64((const __m128i*)low));
        const __m256i both = _mm256_unpacklo_epi64(codes, _mm256_srli_epi16(codes, 4));
        out[0] = _mm256_shuffle_epi8(table, _mm256_and_si256(both, nibble));
    } else {
        for (int c = 0; c < B / 32; c++) {
            const __m256i codes =
                _mm256_set_m128i(_mm_loadu_si128((const __m128i*)(high + 16 * c)),
                                 _mm_loadu_si128((const __m128i*)(low + 16 * c)));
            const __m256i odd = _mm256_srli_epi16(codes, 4);
            out[2 * c] = _mm256_shuffle_epi8(table, _mm256_and_si256(codes, nibble));
            out[2 * c + 1] = _mm256_shuffle_epi8(table, _mm256_and_si256(odd, nibble));
        }
    }
}

template <int B>
constexpr int kPieces = B / 16;  // registers per pair of rows and block

// The block sums of 8 rows with a token's half-units, rows in order; the weight's are still + 16.
template <int B, bool Vnni>
AVX2_INLINE __m256i block_sums(const __m256i* weights, const int8_t* x) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sums[4];
    for (int p = 0; p < 4; p++) {
        __m256i sum = _mm256_setzero_si256();
        for (int c = 0; c < kPieces<B>; c++) {
            const __m256i values =
                _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(x + 16 * c)));
            const __m256i piece = weights[p * kPieces<B> + c];
            if constexpr (Vnni) {
                // four products at once, in int32; as text, so that one function serves both sets
                asm("vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(piece), "x"(values));
            } else {
                const __m256i part = _mm256_maddubs_epi16(piece, values);
                sum = c ? _mm256_add_epi16(sum, part) : part;
            }
        }
        sums[p] = Vnni ? sum : _mm256_madd_epi16(sum, ones);
    }
    const __m256i first = _mm256_madd_epi16(_mm256_packs_epi32(sums[0], sums[1]), ones);
    const __m256i second = _mm256_madd_epi16(_mm256_packs_epi32(sums[2], sums[3]), ones);
    return _mm256_madd_epi16(_mm256_packs_epi32(first, second), ones);
}

// Two pairs of rows by four dwords become four registers of one dword of each of the 8 rows, in
// order: then every lane sums up one row, and nothing is left to be added across lanes.
template <int B, int Groups>
AVX2_INLINE void transpose_block(const __m256i* pairs, __m256i (*panel)[Groups], int g) {
    for (int c = 0; c < kPieces<B>; c++) {
        const __m256i* a = pairs + c;
        const __m256i low01 = _mm256_unpacklo_epi32(a[0], a[kPieces<B>]);
        const __m256i high01 = _mm256_unpackhi_epi32(a[0], a[kPieces<B>]);
        const __m256i low23 = _mm256_unpacklo_epi32(a[2 * kPieces<B>], a[3 * kPieces<B>]);
        const __m256i high23 = _mm256_unpackhi_epi32(a[2 * kPieces<B>], a[3 * kPieces<B>]);
        panel[4 * c][g] = _mm256_unpacklo_epi64(low01, low23);
        panel[4 * c + 1][g] = _mm256_unpackhi_epi64(low01, low23);
        panel[4 * c + 2][g] = _mm256_unpacklo_epi64(high01, high23);
        panel[4 * c + 3][g] = _mm256_unpackhi_epi64(high01, high23);
    }
}

// The block sums of 16 rows, or of the first 8, with NT tokens from a transposed panel; half-units
// are still + 16.
template <int B, bool Vnni, int Digits, int NT, int Groups>
AVX2_INLINE void lane_sums(const __m256i (*panel)[Groups], const int8_t* const* x, int64_t stride,
                           __m256i (*out)[Groups]) {
    // int16 holds the sum of 4 registers of 2 * 128 * 31, or of all with half-units, 2 * 15 * 31
    constexpr int kTogether = Vnni || Digits == 1 ? 4 * kPieces<B> : 4;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sums[NT][Digits][Groups];
#pragma GCC unroll 4
    for (int t = 0; t < NT; t++)
#pragma GCC unroll 3
        for (int d = 0; d < Digits; d++)
#pragma GCC unroll 2
            for (int g = 0; g < Groups; g++) sums[t][d][g] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int first = 0; first < 4 * kPieces<B>; first += kTogether) {
        __m256i parts[NT][Digits][Groups];
#pragma GCC unroll 16
        for (int k = first; k < first + kTogether; k++)
#pragma GCC unroll 4
            for (int t = 0; t < NT; t++)
#pragma GCC unroll 3
                for (int d = 0; d < Digits; d++) {
                    int32_t four;
                    std::memcpy(&four, x[t] + d * stride + 4 * k, 4);
                    const __m256i values = _mm256_set1_epi32(four);
#pragma GCC unroll 2
                    for (int g = 0; g < Groups; g++) {
                        if constexpr (Vnni) {
                            asm("vpdpbusd %2, %1, %0"
                                : "+x"(sums[t][d][g]) : "x"(panel[k][g]), "x"(values));
                        } else {
                            const __m256i part = _mm256_maddubs_epi16(panel[k][g], values);
                            __m256i& to = parts[t][d][g];
                            // as text: compilers turn intrinsics into trees of sums, which spill
                            if (k > first)
                                asm("vpaddw %1, %0, %0" : "+x"(to) : "x"(part));
                            else
                                to = part;
                        }
                    }
                }
        if constexpr (!Vnni) {
#pragma GCC unroll 4
            for (int t = 0; t < NT; t++)
#pragma GCC unroll 3
                for (int d = 0; d < Digits; d++)
#pragma GCC unroll 2
                    for (int g = 0; g < Groups; g++) {
                        const __m256i part = _mm256_madd_epi16(parts[t][d][g], ones);
                        sums[t][d][g] = _mm256_add_epi32(sums[t][d][g], part);
                    }
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < NT; t++)
#pragma GCC unroll 2
        for (int g = 0; g < Groups; g++) {
            out[t][g] = sums[t][0][g];
#pragma GCC unroll 3
            for (int d = 1; d < Digits; d++)
                out[t][g] = _mm256_add_epi32(out[t][g], _mm256_slli_epi32(sums[t][d][g], 8 * d));
        }
}

AVX2_INLINE __m256 add_block(__m256 sum, __m256i sums, int32_t offset, const float* weight_scale,
                             float scale) {
    const __m256 exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_set1_epi32(offset)));
    const __m256 both = _mm256_mul_ps(_mm256_load_ps(weight_scale), _mm256_set1_ps(scale));
    return _mm256_fmadd_ps(exact, both, sum);  // an exact product: one rounding, as without fma
}

// Starts to read the next group of rows: as many bytes of it as block b of this one has.
template <int B>
AVX2_INLINE void fetch_ahead(const uint8_t* next_group, int64_t b) {
    for (int line = 0; line < 4 * B; line += 64)
        _mm_prefetch((const char*)(next_group + b * 4 * B + line), _MM_HINT_T1);
}

// The same for the meta bytes of sixteen blocks.
AVX2_INLINE void fetch_meta_ahead(const uint8_t* next_group, int64_t b0) {
    for (int line = 0; line < 128; line += 64)
        _mm_prefetch((const char*)(next_group + b0 * 8 + line), _MM_HINT_T1);
}

// What a block adds whose numbers do not fit into digits: as in wide_row, relative to the token.
__attribute__((noinline)) void exact_block(const Reader& r, const RowGroup& g, int64_t b,
                                           const Rounded& x, int64_t token, float* out) {
    const int block = r.w.block;
    float values[64];
    load_row(x.x, x.dtype, token * x.columns + b * block,
             std::min<int64_t>(block, x.columns - b * block), block, values);
    for (int i = 0; i < 8; i++) {
        const uint8_t meta = g.meta[i * g.meta_stride + b];
        const int8_t* table = r.book.half_units[r.id(meta)];
        const uint8_t* codes = g.codes + i * g.stride + b * (block / 2);
        double sum = 0.0;
        for (int k = 0; k < block; k += 2) {
            sum += double(values[k]) * table[codes[k / 2] & 15];
            sum += double(values[k + 1]) * table[codes[k / 2] >> 4];
        }
        out[i] = float(sum * (power_of_two(-r.delta(meta)) / x.token_scale.get()[token]));
    }
}

AVX2 void add_exact_block(const Reader& r, const RowGroup& g, int64_t b, const Rounded& x,
                          int64_t token, float* sums) {
    alignas(32) float block[8];
    exact_block(r, g, b, x, token, block);
    _mm256_store_ps(sums, _mm256_add_ps(_mm256_load_ps(sums), _mm256_load_ps(block)));
}

// Sixteen rows as two groups, the second of which has none to write where there are no more.
struct Rows {
    Rows(const Reader& r, int64_t row) : group{RowGroup(r, row), RowGroup(r, row + 8)} {}
    RowGroup group[2];
};

// Sixteen blocks of sixteen rows, decoded and transposed.
template <int B>
struct Panel {
    alignas(64) __m256i weights[16][4 * kPieces<B>][2];
    BlockMeta meta[2];
};

template <int B, bool Signed>
AVX2_INLINE void decode_panel(const Reader& r, const Rows& rows, int64_t b0, int count,
                              Panel<B>& panel) {
    for (int i = 0; i < 2; i++) {
        const RowGroup& g = rows.group[i];
        const uint8_t* ahead = g.codes + 16 * g.stride;
        fetch_meta_ahead(g.meta + 16 * g.meta_stride, b0);
        read_meta(r, g, b0, count, panel.meta[i]);
        for (int j = 0; j < count; j++) {
            fetch_ahead<B>(ahead, b0 + j);
            __m256i pairs[4 * kPieces<B>];
            for (int p = 0; p < 4; p++)
                decode_pair<B, Signed>(r, g, panel.meta[i].table[j], p, b0 + j,
                                       pairs + p * kPieces<B>);
            transpose_block<B, 2>(pairs, panel.weights[j], i);
        }
    }
}

// NT tokens with the blocks start..end-1 of a panel that starts at block b0.
template <int B, bool Vnni, int Digits, int NT>
AVX2 void add_blocks(const Panel<B>& panel, const Rounded& x, const int64_t* tokens, int64_t b0,
                     int start, int end, float (*sums)[16]) {
    const int8_t* values[NT];
    const float* scale[NT];
    const int32_t* offset[NT];
#pragma GCC unroll 4
    for (int t = 0; t < NT; t++) {
        values[t] = x.values.get() + tokens[t] * Digits * x.padded + (b0 + start) * B;
        scale[t] = x.scale.get() + tokens[t] * x.blocks + b0;
        offset[t] = x.offset.get() + tokens[t] * x.blocks + b0;
    }
    for (int j = start; j < end; j++) {
        __m256i blocks[NT][2];
        lane_sums<B, Vnni, Digits, NT, 2>(panel.weights[j], values, x.padded, blocks);
#pragma GCC unroll 4
        for (int t = 0; t < NT; t++) {
            values[t] += B;
#pragma GCC unroll 2
            for (int g = 0; g < 2; g++) {
                const __m256 sum = _mm256_load_ps(sums[t] + 8 * g);
                _mm256_store_ps(sums[t] + 8 * g,
                                add_block(sum, blocks[t][g], offset[t][j], panel.meta[g].scale[j],
                                          scale[t][j]));
            }
        }
    }
}

// Puts the tokens number 16 * group and following, at most 16, side by side.
void interleave(const Rounded& x, int64_t count, int64_t group) {
    const int64_t fours = x.digits * x.padded / 4, first = 16 * group;
    const int64_t tokens = std::min<int64_t>(16, count - first);
    int32_t* to = x.fours.get() + group * fours * 16;
    for (int64_t start = 0; start < fours; start += 16)  // a cache line of each token at a time
        for (int64_t t = 0; t < tokens; t++) {
            const int8_t* from = x.values.get() + x.token(first + t) * x.digits * x.padded;
            for (int64_t i = start; i < std::min(fours, start + 16); i++)
                std::memcpy(to + 16 * i + t, from + 4 * i, 4);
        }
    for (int64_t b = 0; b < x.blocks; b++)
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t at = (group * x.blocks + b) * 16 + t, from = x.token(first + t) * x.blocks + b;
            x.scales.get()[at] = x.scale.get()[from];
            x.starts.get()[at] = -x.offset.get()[from];
        }
}

// The same with sixteen rows in one register, a lane each, for the tokens number at..at+NT-1, which lie
// in one group of 16; half-units are still + 16.
template <int B, int Digits, int NT>
AVX512 void add_blocks_512(const Panel<B>& panel, const Rounded& x, int64_t at, int64_t b0,
                           int start, int end, float (*sums)[16]) {
    const int64_t group = at / 16, slot = at % 16, digit = x.padded / 4 * 16;
    const int32_t* fours = x.fours.get() + group * Digits * digit + (b0 + start) * (B / 4) * 16 + slot;
    const int32_t* starts = x.starts.get() + (group * x.blocks + b0) * 16 + slot;
    const float* scales = x.scales.get() + (group * x.blocks + b0) * 16 + slot;
    for (int j = start; j < end; j++, fours += B / 4 * 16) {
        __m512i blocks[NT][Digits];
#pragma GCC unroll 16
        for (int t = 0; t < NT; t++)
#pragma GCC unroll 3
            for (int d = 0; d < Digits; d++)
                blocks[t][d] = d ? _mm512_setzero_si512() : _mm512_set1_epi32(starts[16 * j + t]);
#pragma GCC unroll 16
        for (int k = 0; k < 4 * kPieces<B>; k++) {
            const __m512i weights = _mm512_load_si512(panel.weights[j][k]);
#pragma GCC unroll 16
            for (int t = 0; t < NT; t++)
#pragma GCC unroll 3
                for (int d = 0; d < Digits; d++)
                    // as text: compilers load the four values first, an instruction each
                    asm("vpdpbusd %2%{1to16%}, %1, %0"
                        : "+v"(blocks[t][d]) : "v"(weights), "m"(fours[d * digit + 16 * k + t]));
        }
        const __m512 weight_scale = _mm512_insertf32x8(
            _mm512_castps256_ps512(_mm256_load_ps(panel.meta[0].scale[j])),
            _mm256_load_ps(panel.meta[1].scale[j]), 1);
#pragma GCC unroll 16
        for (int t = 0; t < NT; t++) {
            __m512i sum = blocks[t][0];
#pragma GCC unroll 3
            for (int d = 1; d < Digits; d++)
                sum = _mm512_add_epi32(sum, _mm512_slli_epi32(blocks[t][d], 8 * d));
            const __m512 both = _mm512_mul_ps(weight_scale, _mm512_set1_ps(scales[16 * j + t]));
            const __m512 exact = _mm512_cvtepi32_ps(sum);
            _mm512_store_ps(sums[t], _mm512_fmadd_ps(exact, both, _mm512_load_ps(sums[t])));
        }
    }
}

// The tokens number first..first+NT-1, which are `tokens`, with the blocks start..end-1 of a panel.
template <int B, bool Vnni, int Digits, int NT>
void add_some_blocks(const Panel<B>& panel, const Rounded& x, const int64_t* tokens, int64_t first,
                     int64_t b0, int start, int end, float (*sums)[16]) {
    if constexpr (Vnni)
        add_blocks_512<B, Digits, NT>(panel, x, first, b0, start, end, sums);
    else
        add_blocks<B, false, Digits, NT>(panel, x, tokens, b0, start, end, sums);
}

// The tokens number first..first+NT-1 with `count` blocks of a panel that starts at block b0.
template <int B, bool Vnni, int Digits, int NT>
void add_panel(const Reader& r, const Rows& rows, const Panel<B>& panel, const Rounded& x,
               int64_t first, int64_t b0, int count, float (*sums)[16]) {
    int64_t tokens[NT];
    uint32_t any = 0;
    for (int t = 0; t < NT; t++) {
        tokens[t] = x.token(first + t);
        if (Digits > 1) any |= x.exceptions_from(tokens[t], b0);
    }
    for (int start = 0; start < count; start++) {
        const uint32_t ahead = any >> start;
        const int end = ahead ? start + __builtin_ctz(ahead) : count;
        add_some_blocks<B, Vnni, Digits, NT>(panel, x, tokens, first, b0, start, end, sums);
        start = end;
        for (int t = 0; t < NT && end < count; t++) {
            if (x.exceptions_from(tokens[t], b0) >> end & 1)
                for (int g = 0; g < 2; g++)
                    add_exact_block(r, rows.group[g], b0 + end, x, tokens[t], sums[t] + 8 * g);
            else
                add_some_blocks<B, Vnni, Digits, 1>(panel, x, tokens + t, first + t, b0, end,
                                                    end + 1, sums + t);
        }
    }
}

// Tokens whose sums fit into the registers together.
template <bool Vnni, int Digits>
constexpr int kTogether = Vnni ? (Digits == 1 ? 16 : 8) : (Digits == 1 ? 4 : 1);

// All tokens of a tile, NT at a time and then half as many.
template <int B, bool Vnni, int Digits, int NT>
void add_panels(const Reader& r, const Rows& rows, const Panel<B>& panel, const Rounded& x,
                int64_t first, int64_t tokens, int64_t b0, int count, float (*sums)[16]) {
    int64_t t = 0;
    for (; t + NT <= tokens; t += NT)
        add_panel<B, Vnni, Digits, NT>(r, rows, panel, x, first + t, b0, count, sums + t);
    if constexpr (NT > 1)
        add_panels<B, Vnni, Digits, NT / 2>(r, rows, panel, x, first + t, tokens - t, b0, count,
                                            sums + t);
}

// The only token of a tile with eight rows: nothing is decoded ahead.
template <int B, bool Vnni, int Digits>
AVX2_INLINE void add_token(const Reader& r, const RowGroup& g, const Rounded& x, int64_t token,
                           float* sums) {
    constexpr int kRegisters = 4 * kPieces<B>;
    const uint8_t* ahead = g.codes + 8 * g.stride;
    BlockMeta meta;
    for (int64_t b0 = 0; b0 < r.blocks; b0 += 16) {
        const int count = int(std::min<int64_t>(16, r.blocks - b0));
        const uint32_t exceptions = Digits > 1 ? x.exceptions_from(token, b0) : 0;
        const int8_t* values = x.values.get() + token * Digits * x.padded + b0 * B;
        const int64_t at = token * x.blocks + b0;
        fetch_meta_ahead(g.meta + 8 * g.meta_stride, b0);
        read_meta(r, g, b0, count, meta);
        __m256 sum = _mm256_load_ps(sums);
        for (int j = 0; j < count; j++, values += B) {
            fetch_ahead<B>(ahead, b0 + j);
            if (exceptions >> j & 1) {
                _mm256_store_ps(sums, sum);
                add_exact_block(r, g, b0 + j, x, token, sums);
                sum = _mm256_load_ps(sums);
                continue;
            }
            __m256i weights[kRegisters];
            for (int p = 0; p < 4; p++)
                decode_pair<B>(r, g, meta.table[j], p, b0 + j, weights + p * kPieces<B>);
            __m256i block[1][1];
            if constexpr (Digits == 1) {
                block[0][0] = block_sums<B, Vnni>(weights, values);
            } else {
                __m256i transposed[kRegisters][1];
                transpose_block<B, 1>(weights, transposed, 0);
                lane_sums<B, Vnni, Digits, 1, 1>(transposed, &values, x.padded, block);
            }
            sum = add_block(sum, block[0][0], x.offset.get()[at + j], meta.scale[j],
                            x.scale.get()[at + j]);
        }
        _mm256_store_ps(sums, sum);
    }
}

// Eight outputs of a token, as `Output::put_scaled` writes each.
AVX2_INLINE void put_eight(const Output& out, int64_t token, int64_t row, const float* sums,
                           const double* row_scales, double token_scale) {
    const __m256d scale = _mm256_set1_pd(token_scale);
    __m128 halves[2];
    for (int i = 0; i < 2; i++) {
        const __m256d both = _mm256_mul_pd(scale, _mm256_load_pd(row_scales + 4 * i));
        const __m256d some = _mm256_cvtps_pd(_mm_load_ps(sums + 4 * i));
        halves[i] = _mm256_cvtpd_ps(_mm256_mul_pd(some, both));
    }
    __m256 values = _mm256_set_m128(halves[1], halves[0]);
    if (out.bias) values = _mm256_add_ps(values, _mm256_loadu_ps(out.bias + row));
    const int64_t at = token * out.rows + row;
    if (out.dtype == FLOAT32) {
        _mm256_storeu_ps(static_cast<float*>(out.y) + at, values);
    } else if (out.dtype == BFLOAT16) {  // as to_bfloat16
        const __m256i bits = _mm256_castps_si256(values), high = _mm256_srli_epi32(bits, 16);
        const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
        const __m256i carry = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, carry), 16);
        const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
        const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
        const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, is_nan);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 8);
        uint16_t* to = static_cast<uint16_t*>(out.y) + at;
        _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(packed));
    } else {
        alignas(32) float some[8];
        _mm256_store_ps(some, values);
        for (int i = 0; i < 8; i++) store(out.y, out.dtype, at + i, some[i]);
    }
}

AVX2 void put_sums(const Rows& rows, const Rounded& x, const Output& out, int64_t first,
                   int64_t tokens, const float (*sums)[16]) {
    for (int g = 0; g < 2; g++) {
        const int64_t row = rows.group[g].first;
        const int skip = rows.group[g].skip;
        alignas(32) double row_scales[8];
        for (int i = 0; i < 8; i++) row_scales[i] = out.row_scale(row + i);
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t token = x.token(first + t);
            const double scale = x.token_scale.get()[token];
            if (skip == 0)
                put_eight(out, token, row, sums[t] + 8 * g, row_scales, scale);
            else
                for (int i = skip; i < 8; i++)
                    out.put_scaled(token, row + i, sums[t][8 * g + i], scale);
        }
    }
}

// Sixteen rows with the tokens number first..first+tokens-1 (at most kTile).
template <int B, bool Vnni, int Digits>
AVX2 void integer_rows(const Reader& r, const Rounded& x, const Output& out, int64_t row,
                       int64_t first, int64_t tokens) {
    const Rows rows(r, row);
    alignas(64) float sums[kTile][16] = {};
    if (tokens == 1) {
        for (int g = 0; g < 2; g++)
            if (rows.group[g].skip < 8)
                add_token<B, Vnni, Digits>(r, rows.group[g], x, x.token(first), sums[0] + 8 * g);
    } else {
        Panel<B> panel;
        for (int64_t b0 = 0; b0 < r.blocks; b0 += 16) {
            const int count = int(std::min<int64_t>(16, r.blocks - b0));
            decode_panel<B, false>(r, rows, b0, count, panel);
            add_panels<B, Vnni, Digits, kTogether<Vnni, Digits>>(r, rows, panel, x, first, tokens,
                                                                 b0, count, sums);
        }
    }
    put_sums(rows, x, out, first, tokens, sums);
}

#if DIALECT_AMX

constexpr int kFewestForAmx = 8;  // tokens; fewer do not pay for a tile

// The AMX tiles of this thread while they hold our shapes, and then whatever they held before:
// products 0..2 [16 tokens, 16 rows], tokens 3 [16, B], weights 4 [B/4, 16 rows, 4].
struct Tiles {
    explicit Tiles(int block) {
        Shapes shapes = {};
        shapes.palette = 1;
        for (int i = 0; i < 5; i++) {
            shapes.rows[i] = uint8_t(i == 4 ? block / 4 : 16);
            shapes.bytes[i] = uint16_t(i == 3 ? block : 64);
        }
        asm volatile("sttilecfg %0" : "=m"(before));
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~Tiles() {
        if (before.palette)
            asm volatile("ldtilecfg %0" ::"m"(before));
        else
            asm volatile("tilerelease");
    }
    struct Shapes {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    };
    Shapes before;
};

// As text: the functions that compilers offer do not say that a tile is read from memory.
#define TILE_LOAD(tile, from, stride)                                                      \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(int64_t(stride)) : "memory")
#define TILE_STORE(tile, to)                                                               \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(int64_t(64)) : "memory")
#define TILE_PRODUCT(tile) /* of a digit of the tokens and the weights */                  \
    asm volatile("tilezero %%tmm" #tile "\n\ttdpbssd %%tmm4, %%tmm3, %%tmm" #tile ::)

// Block sums of 16 tokens and 16 rows, for each digit.
template <int B, int Digits>
INLINE void tile_sums(const __m256i (*weights)[2], const int8_t* tokens,
                      int32_t (*out)[16][16]) {
    TILE_LOAD(4, weights, 64);
    TILE_LOAD(3, tokens, B);
    TILE_PRODUCT(0);
    TILE_STORE(0, out[0]);
    if constexpr (Digits > 1) {
        TILE_LOAD(3, tokens + 16 * B, B);
        TILE_PRODUCT(1);
        TILE_STORE(1, out[1]);
        TILE_LOAD(3, tokens + 32 * B, B);
        TILE_PRODUCT(2);
        TILE_STORE(2, out[2]);
    }
}

// The first NT tokens of a group of 16 with the blocks start..end-1 of a panel of signed half-units.
template <int B, int Digits, int NT>
AVX512 void add_tiles(const Panel<B>& panel, const Rounded& x, int64_t group, int64_t b0,
                      int start, int end, float (*sums)[16]) {
    const int64_t at = group * x.blocks + b0;
    const int8_t* tokens = x.tiles.get() + (at + start) * Digits * 16 * B;
    const float* scales = x.scales.get() + at * 16;
    const int64_t next_group = x.blocks * Digits * 16 * B;
    alignas(64) int32_t products[2][Digits][16][16];
    __m512 total[NT];
#pragma GCC unroll 16
    for (int t = 0; t < NT; t++) total[t] = _mm512_load_ps(sums[t]);
    for (int j = start; j < end; j++, tokens += Digits * 16 * B) {
        const auto product = products[j & 1];
        tile_sums<B, Digits>(panel.weights[j], tokens, product);
        for (int line = 0; line < Digits * 16 * B; line += 64)
            _mm_prefetch((const char*)(tokens + next_group + line), _MM_HINT_T0);
        const __m512 weight_scale = _mm512_insertf32x8(
            _mm512_castps256_ps512(_mm256_load_ps(panel.meta[0].scale[j])),
            _mm256_load_ps(panel.meta[1].scale[j]), 1);
#pragma GCC unroll 16
        for (int t = 0; t < NT; t++) {
            __m512i sum = _mm512_load_si512(product[0][t]);
#pragma GCC unroll 3
            for (int d = 1; d < Digits; d++)
                sum = _mm512_add_epi32(
                    sum, _mm512_slli_epi32(_mm512_load_si512(product[d][t]), 8 * d));
            const __m512 both = _mm512_mul_ps(weight_scale, _mm512_set1_ps(scales[16 * j + t]));
            total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, total[t]);
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < NT; t++) _mm512_store_ps(sums[t], total[t]);
}

// The same for all `count` blocks of the panel, and for blocks whose numbers do not fit.
template <int B, int Digits, int NT>
void add_tile_panel(const Reader& r, const Rows& rows, const Panel<B>& panel, const Rounded& x,
                    int64_t first, int64_t tokens, int64_t b0, int count, float (*sums)[16]) {
    uint32_t any = 0;
    if (Digits > 1)
        for (int64_t t = 0; t < tokens; t++) any |= x.exceptions_from(x.token(first + t), b0);
    for (int start = 0; start < count; start++) {
        const uint32_t ahead = any >> start;
        const int end = ahead ? start + __builtin_ctz(ahead) : count;
        add_tiles<B, Digits, NT>(panel, x, first / 16, b0, start, end, sums);
        start = end;
        if (end == count) break;
        alignas(64) float before[NT][16];
        std::memcpy(before, sums, sizeof before);
        add_tiles<B, Digits, NT>(panel, x, first / 16, b0, end, end + 1, sums);
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t token = x.token(first + t);
            if (!(x.exceptions_from(token, b0) >> end & 1)) continue;
            std::memcpy(sums[t], before[t], sizeof before[t]);
            for (int g = 0; g < 2; g++)
                add_exact_block(r, rows.group[g], b0 + end, x, token, sums[t] + 8 * g);
        }
    }
}

// Sixteen rows with the tokens number first..first+tokens-1 (at most kTile), on matrix tiles.
template <int B, int Digits>
AVX2 void tile_rows(const Reader& r, const Rounded& x, const Output& out, int64_t row,
                    int64_t first, int64_t tokens) {
    const Rows rows(r, row);
    const Tiles tiles(B);
    alignas(64) float sums[kTile][16] = {};
    Panel<B> panel;
    for (int64_t b0 = 0; b0 < r.blocks; b0 += 16) {
        const int count = int(std::min<int64_t>(16, r.blocks - b0));
        decode_panel<B, true>(r, rows, b0, count, panel);
        for (int64_t t = 0; t < tokens; t += 16) {
            const int64_t some = std::min<int64_t>(16, tokens - t);
            const auto add =
                some > 8 ? add_tile_panel<B, Digits, 16> : add_tile_panel<B, Digits, 8>;
            add(r, rows, panel, x, first + t, some, b0, count, sums + t);
        }
    }
    put_sums(rows, x, out, first, tokens, sums);
}

// Puts the tokens number 16 * group and following, at most 16, into tiles: those of all blocks are
// read in a row.
void lay_out_tiles(const Rounded& x, int block, int64_t count, int64_t group) {
    const int64_t first = 16 * group, tokens = std::min<int64_t>(16, count - first);
    int8_t* to = x.tiles.get() + group * x.blocks * x.digits * 16 * block;
    float* scales = x.scales.get() + group * x.blocks * 16;
    if (tokens < 16) {
        std::memset(to, 0, x.blocks * x.digits * 16 * block);
        std::memset(scales, 0, x.blocks * 16 * sizeof(float));
    }
    for (int64_t b = 0; b < x.blocks; b++)
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t token = x.token(first + t);
            const int8_t* from = x.values.get() + token * x.digits * x.padded + b * block;
            for (int d = 0; d < x.digits; d++)
                std::memcpy(to + ((b * x.digits + d) * 16 + t) * block, from + d * x.padded, block);
            scales[16 * b + t] = x.scale.get()[token * x.blocks + b];
        }
}

// Whether processor and system have tiles; the system wants to be asked.
bool may_use_amx() {
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxTile) && (d & kAmxInt8) &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

#endif  // DIALECT_AMX

// 8 rows x 16 elements of int8 -> float64 [16][8], written with a stride of kLanes.
AVX2_INLINE void transpose_to_double(const __m128i* rows, double* out) {
    __m128i columns[8];
    transpose_bytes(rows, columns);
    for (int i = 0; i < 16; i++, out += kLanes) {
        const __m128i bytes = i & 1 ? _mm_srli_si128(columns[i / 2], 8) : columns[i / 2];
        const __m256i wide = _mm256_cvtepi8_epi32(bytes);
        _mm256_store_pd(out, _mm256_cvtepi32_pd(_mm256_castsi256_si128(wide)));
        _mm256_store_pd(out + 4, _mm256_cvtepi32_pd(_mm256_extracti128_si256(wide, 1)));
    }
}

// One block of 8 rows as float64 half-units, [B][kLanes].
template <int B>
AVX2_INLINE void decode_to_double(const Reader& r, const RowGroup& g, int64_t b, double* out) {
    const __m128i nibble = _mm_set1_epi8(15), bias = _mm_set1_epi8(16);
    constexpr int kChunks = B == 16 ? 1 : B / 32;
    for (int c = 0; c < kChunks; c++) {
        __m128i low[8], high[8];
        for (int i = 0; i < 8; i++) {
            const uint8_t* at = g.codes + i * g.stride + b * (B / 2) + 16 * c;
            const __m128i codes = B == 16 ? _mm_loadl_epi64((const __m128i*)at)
                                          : _mm_loadu_si128((const __m128i*)at);
            const int id = r.id(g.meta[i * g.meta_stride + b]);
            const __m128i table = _mm_sub_epi8(load_table(r, 16 * id), bias);
            const __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(codes, nibble));
            const __m128i odd =
                _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(codes, 4), nibble));
            low[i] = _mm_unpacklo_epi8(even, odd);
            high[i] = _mm_unpackhi_epi8(even, odd);
        }
        transpose_to_double(low, out + 32 * c * kLanes);
        if (B > 16) transpose_to_double(high, out + (32 * c + 16) * kLanes);
    }
}

// NT tokens with one decoded block of 16 rows; elements ascending in float64, then one float32 add.
template <int B, int NT>
AVX2_INLINE void add_wide_block(const double* panel, const double* block_scale, const double* x,
                                int64_t stride, float (*sums)[kLanes]) {
    __m256d part[NT][4];
    for (int t = 0; t < NT; t++)
        for (int q = 0; q < 4; q++) part[t][q] = _mm256_setzero_pd();
    for (int k = 0; k < B; k++) {
        __m256d weights[4];
        for (int q = 0; q < 4; q++) weights[q] = _mm256_load_pd(panel + k * kLanes + 4 * q);
        for (int t = 0; t < NT; t++) {
            const __m256d value = _mm256_broadcast_sd(x + t * stride + k);
            for (int q = 0; q < 4; q++)  // an exact product: one rounding, as without fma
                part[t][q] = _mm256_fmadd_pd(value, weights[q], part[t][q]);
        }
    }
    for (int t = 0; t < NT; t++)
        for (int q = 0; q < 4; q++) {
            const __m256d scaled = _mm256_mul_pd(part[t][q], _mm256_load_pd(block_scale + 4 * q));
            float* sum = sums[t] + 4 * q;
            _mm_store_ps(sum, _mm_add_ps(_mm_load_ps(sum), _mm256_cvtpd_ps(scaled)));
        }
}

// Sixteen rows with rows first..first+tokens-1 (at most kTile) of x, which are the tokens order[..].
template <int B>
AVX2 void wide_rows(const Reader& r, const double* x, const int64_t* order, const Output& out,
                    int64_t row, int64_t first, int64_t tokens) {
    const RowGroup g[2] = {RowGroup(r, row), RowGroup(r, row + 8)};
    alignas(32) float sums[kTile][kLanes] = {};
    alignas(32) double panel[B * kLanes];
    alignas(32) double block_scale[kLanes];
    for (int64_t b = 0; b < r.blocks; b++) {
        for (int half = 0; half < 2; half++) {
            decode_to_double<B>(r, g[half], b, panel + 8 * half);
            for (int i = 0; i < 8; i++)
                block_scale[8 * half + i] = r.block_scale(
                    g[half].first + i, g[half].meta[i * g[half].meta_stride + b]);
        }
        const double* values = x + first * r.padded + b * B;
        int64_t t = 0;
        for (; t + 3 <= tokens; t += 3)
            add_wide_block<B, 3>(panel, block_scale, values + t * r.padded, r.padded, sums + t);
        for (; t < tokens; t++)
            add_wide_block<B, 1>(panel, block_scale, values + t * r.padded, r.padded, sums + t);
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int half = 0; half < 2; half++)
            for (int i = g[half].skip; i < 8; i++)
                out.put(order[first + t], g[half].first + i, sums[t][8 * half + i]);
}

template <bool Vnni, int Digits>
auto integer_rows_of(int block) {
    return block == 16   ? integer_rows<16, Vnni, Digits>
           : block == 32 ? integer_rows<32, Vnni, Digits>
                         : integer_rows<64, Vnni, Digits>;
}

auto integer_rows_of(int block, bool vnni, int digits) {
    if (vnni) return digits == 1 ? integer_rows_of<true, 1>(block) : integer_rows_of<true, 3>(block);
    return digits == 1 ? integer_rows_of<false, 1>(block) : integer_rows_of<false, 3>(block);
}

#if DIALECT_AMX
template <int Digits>
auto tile_rows_of(int block) {
    return block == 16   ? tile_rows<16, Digits>
           : block == 32 ? tile_rows<32, Digits>
                         : tile_rows<64, Digits>;
}
#endif

#endif  // DIALECT_X86

// ---- the entry points --------------------------------------------------------------------

// Rows of float32 and block maxima, one pair per task: tasks allocate nothing.
struct Scratch {
    Scratch(int64_t tasks, int64_t padded, int64_t blocks)
        : padded(padded), blocks(blocks), rows(tasks * padded), largest(tasks * blocks) {}
    float* row(int64_t task) const { return rows.get() + task * padded; }
    uint32_t* maxima(int64_t task) const { return largest.get() + task * blocks; }
    int64_t padded, blocks;
    Aligned<float> rows;
    Aligned<uint32_t> largest;
};

// Splits `count` rows into at most 8 tasks a thread and calls work(scratch row, maxima, row).
template <class Work>
void for_each_row(int64_t count, int64_t padded, int block, int threads, const Work& work) {
    const int64_t tasks = std::min<int64_t>(count, threads > 1 ? 8 * int64_t(threads) : 1);
    const Scratch scratch(tasks, padded, padded / block);
    parallel(threads, tasks, [&](int64_t task) {
        for (int64_t row = count * task / tasks; row < count * (task + 1) / tasks; row++)
            work(scratch.row(task), scratch.maxima(task), row);
    });
}

// Calls work(first row, first token, tokens) for groups of `lanes` rows and tiles of tokens, which take
// `bytes` each. A tile should stay in the second-level cache while all rows pass by.
template <class Work>
void for_each_tile(const Reader& r, int64_t tokens, int64_t bytes, int lanes, int threads,
                   const Work& work) {
    const int64_t fitting = kTileBytes / std::max<int64_t>(1, bytes);
    const int64_t wanted = std::min<int64_t>(kTile, std::max<int64_t>(kSmallestTile, fitting));
    const int64_t tile = wanted / kTileStep * kTileStep;
    const int64_t groups = (r.w.rows + lanes - 1) / lanes;
    const int64_t tiles = (tokens + tile - 1) / tile;
    const int64_t cost = std::max<int64_t>(1, lanes * r.padded * std::min<int64_t>(tokens, tile));
    // Groups in one task. Each starts to read the next one, which should be its own, too.
    const int64_t neighbours = std::min<int64_t>(kNeighbours, groups / (8 * int64_t(threads)));
    const int64_t together = std::max<int64_t>({1, neighbours, (1 << 18) / cost});
    const int64_t tasks = (groups + together - 1) / together;
    parallel(threads, tasks * tiles, [&](int64_t i) {
        const int64_t first = i / tasks * tile;
        const int64_t start = i % tasks * together;
        for (int64_t group = start; group < std::min(groups, start + together); group++)
            work(group * lanes, first, std::min<int64_t>(tile, tokens - first));
    });
}

// Products of rounded tokens with every row of the weight.
void multiply(Rounded& rounded, int64_t tokens, const Reader& r, const Output& out, int threads,
              int features) {
    const int64_t bytes = rounded.digits * r.padded;
#if DIALECT_X86
    if (features >= AVX2_FMA && r.w.rows >= 8) {
        const int64_t groups = (tokens + 15) / 16;
#if DIALECT_AMX
        if (features >= AMX_INT8 && tokens >= kFewestForAmx) {
            rounded.tiles = Aligned<int8_t>(groups * bytes * 16);
            rounded.scales = Aligned<float>(groups * r.blocks * 16);
            parallel(threads, groups, [&](int64_t group) {
                lay_out_tiles(rounded, r.w.block, tokens, group);
            });
            const auto rows =
                rounded.digits == 1 ? tile_rows_of<1>(r.w.block) : tile_rows_of<3>(r.w.block);
            for_each_tile(r, tokens, bytes, 16, threads,
                          [&](int64_t row, int64_t first, int64_t count) {
                              rows(r, rounded, out, row, first, count);
                          });
            return;
        }
#endif
        if (features >= AVX512_VNNI && tokens > 1) {
            rounded.fours = Aligned<int32_t>(groups * bytes / 4 * 16);
            rounded.starts = Aligned<int32_t>(groups * r.blocks * 16);
            rounded.scales = Aligned<float>(groups * r.blocks * 16);
            parallel(threads, groups, [&](int64_t group) { interleave(rounded, tokens, group); });
        }
        const auto rows = integer_rows_of(r.w.block, features >= AVX512_VNNI, rounded.digits);
        for_each_tile(r, tokens, bytes, 16, threads, [&](int64_t row, int64_t first, int64_t count) {
            rows(r, rounded, out, row, first, count);
        });
        return;
    }
#endif
    for_each_tile(r, tokens, bytes, 1, threads, [&](int64_t row, int64_t first, int64_t count) {
        integer_row(r, rounded, out, row, first, count);
    });
}

void linear_fp8(const void* x, int64_t tokens, const Reader& r, const Output& out, int threads,
                int features) {
    const int block = r.w.block;
    Rounded rounded(tokens, r.padded, block, 3);
    for_each_row(tokens, r.padded, block, threads, [&](float* row, uint32_t*, int64_t t) {
        BY_FEATURES(digits_of_token, features, block, x, out.dtype, t, r.w.columns, row, rounded);
    });
    multiply(rounded, tokens, r, out, threads, features);
}

// The tokens, then the residuals of the salient ones: out has count + salient_count rows.
void linear_dialect(const Tokens& tokens, int64_t count, const int64_t* salient,
                    int64_t salient_count, const Reader& r, const Output& out, int threads,
                    int features) {
    const int block = r.w.block;
    const int64_t total = count + salient_count;
    Rounded rounded(total, r.padded, block, 1);
    for_each_row(total, r.padded, block, threads, [&](float* row, uint32_t* maxima, int64_t at) {
        const bool residual = at >= count;
        const int64_t token = residual ? salient[at - count] : at;
        BY_FEATURES(round_token, features, block, tokens, token, residual, at, r.book, row, maxima,
                    rounded);
    });
    multiply(rounded, total, r, out, threads, features);
}

// The tokens `order` in float64.
void multiply_wide(const void* x, const std::vector<int64_t>& order, const Reader& r,
                   const Output& out, int threads, int features) {
    const int block = r.w.block;
    const int64_t tokens = int64_t(order.size()), bytes = r.padded * sizeof(double);
    const Aligned<double> wide(tokens * r.padded);
    for_each_row(tokens, r.padded, block, threads, [&](float* row, uint32_t*, int64_t i) {
        BY_FEATURES(widen_token, features, x, out.dtype, order[i], r.w.columns, r.padded, row,
                    wide.get() + i * r.padded);
    });
#if DIALECT_X86
    if (features >= AVX2_FMA && r.w.rows >= 8) {
        const auto rows = block == 16   ? wide_rows<16>
                          : block == 32 ? wide_rows<32>
                                        : wide_rows<64>;
        for_each_tile(r, tokens, bytes, kLanes, threads, [&](int64_t row, int64_t first, int64_t count) {
            rows(r, wide.get(), order.data(), out, row, first, count);
        });
        return;
    }
#endif
    for_each_tile(r, tokens, bytes, 1, threads, [&](int64_t row, int64_t first, int64_t count) {
        wide_row(r, wide.get(), order.data(), out, row, first, count);
    });
}

// Whether no product of the weight with what integers_of_token takes can leave float32's range.
bool has_moderate_rows(const Weight& w) {
    return std::all_of(w.row_exponent, w.row_exponent + w.rows, [](int8_t exponent) {
        return exponent == kNanRow || (exponent >= -25 && exponent <= 40);
    });
}

// In integers where that gives the bits of float64, which is the definition.
void linear_none(const void* x, int64_t tokens, const Reader& r, const Output& out, int threads,
                 int features) {
    std::vector<int64_t> rest;
    const bool integers = features >= AVX2_FMA && r.w.rows >= 8 && has_moderate_rows(r.w);
    if (integers) {
        Rounded rounded(tokens, r.padded, r.w.block, 3);
        rounded.exceptions.resize(tokens * ((r.blocks + 15) / 16));
        rounded.x = x;
        rounded.dtype = out.dtype;
        rounded.columns = r.w.columns;
        std::vector<uint8_t> served(tokens);
        for_each_row(tokens, r.padded, r.w.block, threads,
                     [&](float* row, uint32_t* maxima, int64_t t) {
                         served[t] = BY_FEATURES(integers_of_token, features, r.w.block, x,
                                                 out.dtype, t, r.w.columns, row, maxima, rounded);
                     });
        for (int64_t t = 0; t < tokens; t++) (served[t] ? rounded.order : rest).push_back(t);
        multiply(rounded, int64_t(rounded.order.size()), r, out, threads, features);
    } else {
        for (int64_t t = 0; t < tokens; t++) rest.push_back(t);
    }
    multiply_wide(x, rest, r, out, threads, features);
}

template <class Call>
int32_t guarded(const Call& call) {
    try {
        call();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

extern "C" {

// Gives the kernel the OpenMP runtime that PyTorch uses, by its function GOMP_parallel.
void dialect_use_openmp(void* gomp_parallel) {
#if defined(__linux__)
    openmp.store(reinterpret_cast<Region>(gomp_parallel));
    openmp_owner.store(getpid());
#else
    (void)gomp_parallel;
#endif
}

// Whether OpenMP's threads serve the calling thread, if it asks for so many.
int32_t dialect_uses_openmp(int32_t threads) {
#if defined(__linux__)
    return threads > 1 && openmp_for(threads);
#else
    return (void)threads, 0;
#endif
}

// On how many CPUs the calling thread and its helpers may run, if it asks for so many threads; 0 if
// that cannot be told.
int32_t dialect_cpus(int32_t threads) {
#if defined(__linux__)
    CpuMask mask = CpuMask::of(0);
    if (threads <= 1) return std::min(mask.count(), 1);
    const Region region = openmp_for(threads);
    mask.add(region ? cpus_of_openmp(region, threads) : cpus_of_helpers(threads));
    return std::min(mask.count(), threads);
#else
    return (void)threads, 0;
#endif
}

// The best instruction set of this processor that this file has code for. Asks Linux for AMX.
int32_t dialect_features() {
#if DIALECT_X86
    static const Features best = [] {
        if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return SCALAR;
        if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512vl"))
            return AVX2_FMA;
#if DIALECT_AMX
        if (may_use_amx()) return AMX_INT8;
#endif
        return AVX512_VNNI;
    }();
    return best;
#else
    return SCALAR;
#endif
}

// x [rows, columns] -> codes [rows, padded/2], meta [rows, padded/block], row_exponent [rows] and
// the number of non-zero blocks below the window [rows]. A row with NaN or Inf gets R = -128.
// Returns 0, or 1 if memory ran out (all functions).
int32_t dialect_quantize(const void* x, int32_t dtype, int64_t rows, int64_t columns,
                         const Book* book, int32_t block, int32_t rule, int32_t window,
                         uint8_t* codes, uint8_t* meta, int8_t* row_exponent,
                         int64_t* below_window, int32_t threads, int32_t features) {
    const int64_t padded = (columns + block - 1) / block * block;
    const Packed out = {codes, meta, row_exponent, below_window};
    return guarded([&] {
        for_each_row(rows, padded, block, threads, [&](float* values, uint32_t* maxima, int64_t n) {
            BY_FEATURES(quantize_row, features, block, x, dtype, n, columns, padded, rule, window,
                        *book, values, maxima, out);
        });
    });
}

// y [tokens, weight rows] = x [tokens, weight columns] times the weight, plus bias (or null); both
// x and y of `dtype`.
int32_t dialect_linear(const void* x, int32_t dtype, int64_t tokens, const Weight* weight,
                       const Book* book, int32_t format, const float* bias, void* y,
                       int32_t threads, int32_t features) {
    return guarded([&] {
        const Reader r(*weight, *book);
        const Output out = {y, dtype, weight->rows, bias, weight->row_exponent};
        if (format == NONE)
            linear_none(x, tokens, r, out, threads, features);
        else if (format == FP8)
            linear_fp8(x, tokens, r, out, threads, features);
        else
            linear_dialect({x, dtype, weight->columns, nullptr}, tokens, nullptr, 0, r, out,
                           threads, features);
    });
}

// y float32 [tokens + salient_count, weight rows]: the products of the rounded tokens, then those of
// what rounding left over of the tokens in `salient` [salient_count]. `variants` [tokens, blocks]
// holds the variant that a block's group has chosen, -1 for a free block; or it is null.
int32_t dialect_decomposed(const void* x, int32_t dtype, int64_t tokens, const int8_t* variants,
                           const int64_t* salient, int64_t salient_count, const Weight* weight,
                           const Book* book, float* y, int32_t threads, int32_t features) {
    return guarded([&] {
        const Reader r(*weight, *book);
        const Output out = {y, FLOAT32, weight->rows, nullptr, weight->row_exponent};
        linear_dialect({x, dtype, weight->columns, variants}, tokens, salient, salient_count, r,
                       out, threads, features);
    });
}

// out float32 [rows, columns]: the rounded values; `variants` as above. A row with NaN or Inf is NaN.
int32_t dialect_round(const void* x, int32_t dtype, int64_t rows, int64_t columns,
                      const int8_t* variants, const Book* book, int32_t block, float* out,
                      int32_t threads, int32_t features) {
    const int64_t padded = (columns + block - 1) / block * block;
    const Tokens tokens = {x, dtype, columns, variants};
    return guarded([&] {
        for_each_row(rows, padded, block, threads, [&](float* row, uint32_t* maxima, int64_t t) {
            BY_FEATURES(round_row, features, block, tokens, t, padded, *book, row, maxima, out);
        });
    });
}

// out int32 [rows, blocks, variants]: what each variant of a block's range would cost, by the online
// rule; 0 in a row with NaN or Inf.
int32_t dialect_costs(const void* x, int32_t dtype, int64_t rows, int64_t columns,
                      const Book* book, int32_t block, int32_t* out, int32_t threads,
                      int32_t features) {
    const int64_t padded = (columns + block - 1) / block * block;
    const Tokens tokens = {x, dtype, columns, nullptr};
    return guarded([&] {
        for_each_row(rows, padded, block, threads, [&](float* row, uint32_t* maxima, int64_t t) {
            BY_FEATURES(costs_of_row, features, block, tokens, t, padded, *book, row, maxima, out);
        });
    });
}

// The weight as float32 [rows, columns].
int32_t dialect_dequantize(const Weight* weight, const Book* book, float* out, int32_t threads) {
    return guarded([&] {
        const Reader r(*weight, *book);
        const int64_t columns = weight->columns;
        const int block = weight->block;
        const int64_t tasks = std::min<int64_t>(weight->rows, 8 * int64_t(threads));
        parallel(threads, tasks, [&](int64_t task) {
            const int64_t end = weight->rows * (task + 1) / tasks;
            for (int64_t row = weight->rows * task / tasks; row < end; row++)
                for (int64_t b = 0; b < r.blocks; b++) {
                    const uint8_t meta = r.meta(row)[b];
                    const float scale = float(r.block_scale(row, meta));
                    const int8_t* half_units = book->half_units[r.id(meta)];
                    float table[16];
                    for (int code = 0; code < 16; code++) table[code] = half_units[code] * scale;
                    table[8] = -table[0];
                    const uint8_t* codes = r.codes(row) + b * (block / 2);
                    const int64_t stop = std::min<int64_t>(block, columns - b * block);
                    float* to = out + row * columns + b * block;
                    for (int64_t i = 0; i < stop; i++)
                        to[i] = table[i & 1 ? codes[i / 2] >> 4 : codes[i / 2] & 15];
                }
        });
    });
}

}  // extern "C"

// y = x Wᵀ for a few tokens x, of a weight W (M, K) that is laid out by rows: `rows.py` says how, `decode.py` calls this.
//
// A row is read once: its bits and its values, in order, nothing else.  `expand` has a bit for each weight and moves
// the values of a vector of weights to their places in a register; `runs` has a bit for each 16 weights, which are all
// kept or all pruned, and passes over those that are not there.  Sums are in float32.

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VBMI2__)
#define LEVEL "AVX-512"
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#define LEVEL "AVX2"
#include <immintrin.h>
#else
#define LEVEL "plain"
#endif

namespace {

using bf16 = uint16_t;

inline float widen(float value) { return value; }
inline float widen(bf16 value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VBMI2__)

constexpr int WIDE = 16;
using Vector = __m512;
inline Vector none() { return _mm512_setzero_ps(); }
inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline Vector load(const bf16* p) {
    __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}
inline Vector add_product(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
inline float total(Vector v) { return _mm512_reduce_add_ps(v); }
// The next values at the places whose bits are set; no more of them are read than there are bits.
inline Vector spread(const float*& p, const uint8_t* bits, const float*) {
    uint16_t mask;
    std::memcpy(&mask, bits, 2);
    int count = __builtin_popcount(mask);
    Vector v = _mm512_maskz_expand_ps(mask, _mm512_maskz_loadu_ps(static_cast<uint16_t>((1u << count) - 1), p));
    p += count;
    return v;
}
inline Vector spread(const bf16*& p, const uint8_t* bits, const bf16*) {
    uint16_t mask;
    std::memcpy(&mask, bits, 2);
    int count = __builtin_popcount(mask);
    __m256i next = _mm256_maskz_loadu_epi16(static_cast<uint16_t>((1u << count) - 1), p);
    __m256i placed = _mm256_maskz_expand_epi16(mask, next);
    p += count;
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(placed), 16));
}

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int WIDE = 8;
using Vector = __m256;
inline Vector none() { return _mm256_setzero_ps(); }
inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline Vector load(const bf16* p) {
    __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}
inline Vector add_product(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
inline float total(Vector v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
// Where each of 8 places takes its value from, by the bits of the places: -1 is nothing.
struct Sources {
    alignas(32) int32_t from[256][8];
    Sources() {
        for (int mask = 0; mask < 256; ++mask)
            for (int place = 0, next = 0; place < 8; ++place) from[mask][place] = mask >> place & 1 ? next++ : -1;
    }
};
const Sources sources;
template <class Value>
inline Vector spread(const Value*& p, const uint8_t* bits, const Value* end) {
    int count = __builtin_popcount(*bits);
    Vector next;
    if (end - p >= 8) {
        next = load(p);
    } else {  // near the end of all values
        alignas(32) float last[8] = {};
        for (int i = 0; i < count; ++i) last[i] = widen(p[i]);
        next = _mm256_load_ps(last);
    }
    __m256i from = _mm256_load_si256(reinterpret_cast<const __m256i*>(sources.from[*bits]));
    Vector placed = _mm256_permutevar8x32_ps(next, from);
    p += count;
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(from, 31)), placed);
}

#else

constexpr int WIDE = 8;
struct Vector { float at[8]; };
inline Vector none() { return Vector{}; }
template <class Value>
inline Vector load(const Value* p) {
    Vector v;
    for (int i = 0; i < 8; ++i) v.at[i] = widen(p[i]);
    return v;
}
inline Vector add_product(Vector a, Vector b, Vector sum) {
    for (int i = 0; i < 8; ++i) sum.at[i] += a.at[i] * b.at[i];
    return sum;
}
inline float total(Vector v) {
    float sum = 0;
    for (float part : v.at) sum += part;
    return sum;
}
template <class Value>
inline Vector spread(const Value*& p, const uint8_t* bits, const Value*) {
    Vector v;
    for (int i = 0; i < 8; ++i) v.at[i] = *bits >> i & 1 ? widen(*p++) : 0.0f;
    return v;
}

#endif

template <int TOKENS, class Value>
void expand(const uint8_t* bits, const int64_t* starts, const Value* values, const float* x, float* y, int64_t M,
            int64_t K, int threads) {
    const Value* end = values + starts[M];
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < M; ++row) {
        const uint8_t* own = bits + row * (K / 8);
        const Value* next = values + starts[row];
        Vector even[TOKENS], odd[TOKENS];
        for (int t = 0; t < TOKENS; ++t) even[t] = odd[t] = none();
        for (int64_t k = 0; k < K; k += 2 * WIDE) {
            Vector first = spread(next, own + k / 8, end), second = spread(next, own + (k + WIDE) / 8, end);
            for (int t = 0; t < TOKENS; ++t) {
                even[t] = add_product(first, load(x + t * K + k), even[t]);
                odd[t] = add_product(second, load(x + t * K + k + WIDE), odd[t]);
            }
        }
        for (int t = 0; t < TOKENS; ++t) y[t * M + row] = total(even[t]) + total(odd[t]);
    }
}

template <int TOKENS, class Value>
void runs(const uint8_t* bits, const int64_t* starts, const Value* values, const float* x, float* y, int64_t M,
          int64_t K, int threads) {
    int64_t bytes = (K / 16 + 7) / 8;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < M; ++row) {
        const Value* next = values + starts[row];
        Vector sum[TOKENS][16 / WIDE];
        for (int t = 0; t < TOKENS; ++t)
            for (Vector& part : sum[t]) part = none();
        for (int64_t byte = 0; byte < bytes; ++byte)
            for (unsigned mask = bits[row * bytes + byte]; mask; mask &= mask - 1) {
                const float* there = x + (byte * 8 + __builtin_ctz(mask)) * 16;
                for (int part = 0; part < 16 / WIDE; ++part, next += WIDE)
                    for (int t = 0; t < TOKENS; ++t)
                        sum[t][part] = add_product(load(next), load(there + t * K + part * WIDE), sum[t][part]);
            }
        for (int t = 0; t < TOKENS; ++t) {
            y[t * M + row] = 0;
            for (Vector part : sum[t]) y[t * M + row] += total(part);
        }
    }
}

template <class Value>
int multiply(int run, const uint8_t* bits, const int64_t* starts, const Value* values, const float* x, float* y,
             int64_t M, int64_t K, int tokens, int threads) {
    switch (tokens) {
#define CASE(T)                                                                  \
    case T:                                                                      \
        run == 1 ? expand<T>(bits, starts, values, x, y, M, K, threads)          \
                 : runs<T>(bits, starts, values, x, y, M, K, threads);           \
        return 0;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
    return 1;
}

}  // namespace

extern "C" {

const char* s3lab_level() { return LEVEL; }

int s3lab_multiply_float32(int run, const uint8_t* bits, const int64_t* starts, const float* values, const float* x,
                           float* y, int64_t M, int64_t K, int tokens, int threads) {
    return multiply(run, bits, starts, values, x, y, M, K, tokens, threads);
}

int s3lab_multiply_bfloat16(int run, const uint8_t* bits, const int64_t* starts, const bf16* values, const float* x,
                            float* y, int64_t M, int64_t K, int tokens, int threads) {
    return multiply(run, bits, starts, values, x, y, M, K, tokens, threads);
}
}

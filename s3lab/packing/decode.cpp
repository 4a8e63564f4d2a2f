// y = x Wᵀ for a few tokens x, of a weight W (M, K) that is laid out by rows: `rows.py` says how, `decode.py` calls this.
//
// A row is read once: its bits and its values, in order, nothing else.  `expand` has a bit for each weight and moves
// the values of a vector of weights to their places in a register; `gather` does so where 8 of each 16 weights are
// kept, and moves the tokens to the values instead, of which none is then multiplied by zero; `runs` has a bit for each
// 16 weights, which are all kept or all pruned, and passes over those that are not there; `whole` has no bits, as all
// weights are there.  Tokens are of the weight's type, so that they stay in the first cache; sums are in float32.

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

constexpr int64_t PADDED = 64;  // tokens end so for rows that are whole
constexpr int AHEAD = 2048;     // bytes: values that have to be placed are asked for so early

using bf16 = uint16_t;

inline float widen(float value) { return value; }
inline float widen(bf16 value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VBMI2__)

using Vector = __m512;
inline Vector none() { return _mm512_setzero_ps(); }
inline float total(Vector v) { return _mm512_reduce_add_ps(v); }

// Vectors of weights as they are in memory: 16 of float32, 32 of bfloat16.
inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
inline __m512i load(const bf16* p) { return _mm512_loadu_si512(p); }
inline Vector add_product(__m512 a, __m512 b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
inline Vector add_product(__m512i a, __m512i b, Vector sum) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
    auto odd = [&](__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, high)); };
    auto even = [&](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
    return _mm512_fmadd_ps(odd(a), odd(b), _mm512_fmadd_ps(even(a), even(b), sum));
#endif
}
// The next values at the places whose bits are set; near the end no more of them are read than there are bits.
inline __m512 spread(const float*& p, const uint8_t* bits, const float* end) {
    uint16_t mask;
    std::memcpy(&mask, bits, 2);
    int count = __builtin_popcount(mask);
    __m512 next = end - p >= 16 ? load(p) : _mm512_maskz_loadu_ps(static_cast<uint16_t>((1u << count) - 1), p);
    p += count;
    return _mm512_maskz_expand_ps(mask, next);
}
inline __m512i spread(const bf16*& p, const uint8_t* bits, const bf16* end) {
    uint32_t mask;
    std::memcpy(&mask, bits, 4);
    int count = __builtin_popcount(mask);
    __m512i next = end - p >= 32 ? load(p) : _mm512_maskz_loadu_epi16(static_cast<uint32_t>((1ull << count) - 1), p);
    p += count;
    return _mm512_maskz_expand_epi16(mask, next);
}
template <class Value>
constexpr int WIDE = 64 / sizeof(Value);

constexpr int FLOATS = 16;
inline Vector load_floats(const float* p) { return load(p); }
inline Vector load_floats(const bf16* p) {
    __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

#elif defined(__AVX2__) && defined(__FMA__)

template <class Value>
constexpr int WIDE = 8;
constexpr int FLOATS = 8;
using Vector = __m256;
inline Vector none() { return _mm256_setzero_ps(); }
inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline Vector load(const bf16* p) {
    __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}
template <class Value>
inline Vector load_floats(const Value* p) { return load(p); }
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

// Where each of 8 lanes takes its value from, so that the places whose bits are set come first (0) or last (1).
struct Kept {
    alignas(32) int32_t floats[2][256][8];
    alignas(16) int8_t halves[2][256][16];  // by bytes, of which -1 is zero
    Kept() {
        std::memset(this, -1, sizeof *this);
        for (int mask = 0; mask < 256; ++mask)
            for (int place = 0, next = 0; place < 8; ++place) {
                if (!(mask >> place & 1)) continue;
                int lanes[2] = {next, 8 - __builtin_popcount(mask) + next};
                for (int end = 0; end < 2; ++end) {
                    floats[end][mask][lanes[end]] = place;
                    for (int part = 0; part < 2; ++part)
                        halves[end][mask][2 * lanes[end] + part] = static_cast<int8_t>(2 * place + part);
                }
                ++next;
            }
    }
};
const Kept lanes;

// The sums of products of the next 16 values with those of 32 columns whose bits are set, 8 of each 16.
inline void add_half(const float* values, const float* x, const uint8_t* bits, Vector& even, Vector& odd) {
    auto kept = [](const float* columns, int low, int high) {
        __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes.floats[0][low]));
        __m256i last = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes.floats[1][high]));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(load(columns), first),
                                _mm256_permutevar8x32_ps(load(columns + 8), last), _mm256_castsi256_ps(first));
    };
    even = add_product(kept(x, bits[0], bits[1]), load(values), even);
    odd = add_product(kept(x + 16, bits[2], bits[3]), load(values + 8), odd);
}
inline __m128i read(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void add_pairs(__m256i a, __m256i b, Vector& even, Vector& odd) {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
    auto upper = [&](__m256i v) { return _mm256_castsi256_ps(_mm256_and_si256(v, high)); };
    auto lower = [&](__m256i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); };
    even = add_product(lower(a), lower(b), even);
    odd = add_product(upper(a), upper(b), odd);
}
inline void add_half(const bf16* values, const bf16* x, const uint8_t* bits, Vector& even, Vector& odd) {
    auto kept = [](const bf16* columns, int low, int high) {
        return _mm_or_si128(_mm_shuffle_epi8(read(columns), read(lanes.halves[0][low])),
                            _mm_shuffle_epi8(read(columns + 8), read(lanes.halves[1][high])));
    };
    __m256i own = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    add_pairs(_mm256_set_m128i(kept(x + 16, bits[2], bits[3]), kept(x, bits[0], bits[1])), own, even, odd);
}
#define GATHERS

#else

template <class Value>
constexpr int WIDE = 8;
constexpr int FLOATS = 8;
struct Vector { float at[8]; };
inline Vector none() { return Vector{}; }
template <class Value>
inline Vector load(const Value* p) {
    Vector v;
    for (int i = 0; i < 8; ++i) v.at[i] = widen(p[i]);
    return v;
}
template <class Value>
inline Vector load_floats(const Value* p) { return load(p); }
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

// One row times the tokens: `next` gives the weights from column k on, and is asked in order.
template <int TOKENS, class Value, class Next>
inline void multiply_row(Next next, const Value* x, int64_t stride, float* y, int64_t M, int64_t K) {
    constexpr int W = WIDE<Value>;
    Vector even[TOKENS], odd[TOKENS];
    for (int t = 0; t < TOKENS; ++t) even[t] = odd[t] = none();
    for (int64_t k = 0; k < K; k += 2 * W) {
        auto first = next(k);
        for (int t = 0; t < TOKENS; ++t) even[t] = add_product(first, load(x + t * stride + k), even[t]);
        if (k + W >= K) break;
        auto second = next(k + W);
        for (int t = 0; t < TOKENS; ++t) odd[t] = add_product(second, load(x + t * stride + k + W), odd[t]);
    }
    for (int t = 0; t < TOKENS; ++t) y[t * M] = total(even[t]) + total(odd[t]);
}

template <int TOKENS, class Value>
void expand(const uint8_t* bits, const int64_t* starts, const Value* values, const Value* x, float* y, int64_t M,
            int64_t K, int threads) {
    const Value* end = values + starts[M];
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < M; ++row) {
        const uint8_t* own = bits + row * (K / 8);
        const Value* p = values + starts[row];
        auto next = [&](int64_t k) {
            __builtin_prefetch(reinterpret_cast<const char*>(p) + AHEAD);
            return spread(p, own + k / 8, end);
        };
        multiply_row<TOKENS>(next, x, K, y + row, M, K);
    }
}

#ifdef GATHERS

template <int TOKENS, class Value>
void gather(const uint8_t* bits, const int64_t*, const Value* values, const Value* x, float* y, int64_t M, int64_t K,
            int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < M; ++row) {
        const uint8_t* own = bits + row * (K / 8);
        const Value* p = values + row * (K / 2);
        Vector even[TOKENS], odd[TOKENS];
        for (int t = 0; t < TOKENS; ++t) even[t] = odd[t] = none();
        for (int64_t k = 0; k < K; k += 32, own += 4, p += 16) {
            __builtin_prefetch(reinterpret_cast<const char*>(p) + AHEAD);
            for (int t = 0; t < TOKENS; ++t) add_half(p, x + t * K + k, own, even[t], odd[t]);
        }
        for (int t = 0; t < TOKENS; ++t) y[t * M + row] = total(even[t]) + total(odd[t]);
    }
}

#else

template <int TOKENS, class Value>
void gather(const uint8_t* bits, const int64_t* starts, const Value* values, const Value* x, float* y, int64_t M,
            int64_t K, int threads) {
    expand<TOKENS>(bits, starts, values, x, y, M, K, threads);
}

#endif

template <int TOKENS, class Value>
void whole(const Value* values, const Value* x, float* y, int64_t M, int64_t K, int threads) {
    int64_t stride = (K + PADDED - 1) / PADDED * PADDED;
    const Value* end = values + M * K;
    uint64_t last = (uint64_t{1} << K % WIDE<Value>) - 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < M; ++row) {
        const Value* own = values + row * K;
        auto next = [&](int64_t k) {
            const Value* p = own + k;
            return K - k >= WIDE<Value> ? load(p) : spread(p, reinterpret_cast<const uint8_t*>(&last), end);
        };
        multiply_row<TOKENS>(next, x, stride, y + row, M, K);
    }
}

template <int TOKENS, class Value>
void runs(const uint8_t* bits, const int64_t* starts, const Value* values, const Value* x, float* y, int64_t M,
          int64_t K, int threads) {
    int64_t words = (K / 16 + 63) / 64;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < M; ++row) {
        const Value* next = values + starts[row];
        Vector sum[TOKENS][16 / FLOATS];
        for (int t = 0; t < TOKENS; ++t)
            for (Vector& part : sum[t]) part = none();
        for (int64_t word = 0; word < words; ++word) {
            uint64_t mask;
            std::memcpy(&mask, bits + (row * words + word) * 8, 8);
            for (; mask; mask &= mask - 1) {
                const Value* there = x + (word * 64 + __builtin_ctzll(mask)) * 16;
                for (int part = 0; part < 16 / FLOATS; ++part, next += FLOATS, there += FLOATS)
                    for (int t = 0; t < TOKENS; ++t)
                        sum[t][part] = add_product(load_floats(next), load_floats(there + t * K), sum[t][part]);
            }
        }
        for (int t = 0; t < TOKENS; ++t) {
            y[t * M + row] = 0;
            for (Vector part : sum[t]) y[t * M + row] += total(part);
        }
    }
}

enum Layout { SINGLE, HALF, RUNS, WHOLE };  // in the order of `decode.py`

template <class Value>
int multiply(int layout, const uint8_t* bits, const int64_t* starts, const Value* values, const Value* x, float* y,
             int64_t M, int64_t K, int tokens, int threads) {
    switch (tokens) {
#define CASE(T)                                                                        \
    case T:                                                                            \
        if (layout == WHOLE) whole<T>(values, x, y, M, K, threads);                    \
        else if (layout == RUNS) runs<T>(bits, starts, values, x, y, M, K, threads);   \
        else if (layout == HALF) gather<T>(bits, starts, values, x, y, M, K, threads); \
        else expand<T>(bits, starts, values, x, y, M, K, threads);                     \
        return 0;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
    return 1;
}

}  // namespace

extern "C" {

const char* s3lab_level() { return LEVEL; }

int s3lab_multiply_float32(int layout, const uint8_t* bits, const int64_t* starts, const float* values, const float* x,
                           float* y, int64_t M, int64_t K, int tokens, int threads) {
    return multiply(layout, bits, starts, values, x, y, M, K, tokens, threads);
}

int s3lab_multiply_bfloat16(int layout, const uint8_t* bits, const int64_t* starts, const bf16* values, const bf16* x,
                            float* y, int64_t M, int64_t K, int tokens, int threads) {
    return multiply(layout, bits, starts, values, x, y, M, K, tokens, threads);
}
}

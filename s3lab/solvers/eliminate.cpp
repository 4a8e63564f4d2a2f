// Which columns of a panel S-OBS takes, unit by unit: `eliminate.py` says what, and calls this.
//
// Each group has its own C (n, n) and w (n, R), small enough for the first caches, and is worked on by one thread from
// the first unit to the last.  Units come in batches: those of one are weighed on the same C and w, and then taken out
// of what is behind them, of which the upper triangle is enough.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

// Sizes of a call: groups, columns of a panel, rows of a group, batches, choices of a unit, columns of a choice.
struct Sizes {
    int64_t G, n, R, batches, c, e;
};

template <typename T>
class Group {
  public:
    explicit Group(const Sizes& sizes) : s(sizes), C(s.n * s.n), w(s.n * s.R), A(s.e * s.e), v(s.e * s.R) {}

    void load(const T* C_, const T* w_) {
        std::copy(C_, C_ + s.n * s.n, C.begin());
        std::copy(w_, w_ + s.n * s.R, w.begin());
    }

    // The number of the set, of c, that costs least.
    int64_t choose(const int32_t* sets) {
        int64_t best = 0;
        T least = cost(sets);
        for (int64_t i = 1; i < s.c; ++i) {
            const T found = cost(sets + i * s.e);
            if (found < least) least = found, best = i;
        }
        return best;
    }

    // Takes columns P out of the columns from `behind` on.
    void take(const std::vector<int32_t>& P, int64_t behind) {
        const int64_t p = P.size(), rest = s.n - behind;
        factor.resize(p * rest), dual.resize(p * s.R), L.resize(p * p);
        for (int64_t i = 0; i < p; ++i) {
            for (int64_t j = 0; j <= i; ++j) L[i * p + j] = at(P[j], P[i]);
            for (int64_t j = 0; j < rest; ++j) factor[i * rest + j] = at(P[i], behind + j);
            for (int64_t r = 0; r < s.R; ++r) dual[i * s.R + r] = w[P[i] * s.R + r];
        }
        for (int64_t i = 0; i < p; ++i) {  // L, L⁻¹C and L⁻¹w together, row by row
            for (int64_t j = 0; j < i; ++j) {
                T l = L[i * p + j];
                for (int64_t k = 0; k < j; ++k) l -= L[i * p + k] * L[j * p + k];
                l /= L[j * p + j];
                L[i * p + j] = l;
                L[i * p + i] -= l * l;
                subtract(&factor[i * rest], &factor[j * rest], l, rest);
                subtract(&dual[i * s.R], &dual[j * s.R], l, s.R);
            }
            const T pivot = std::sqrt(L[i * p + i]);
            L[i * p + i] = pivot;
            for (int64_t j = 0; j < rest; ++j) factor[i * rest + j] /= pivot;
            for (int64_t r = 0; r < s.R; ++r) dual[i * s.R + r] /= pivot;
        }
        for (int64_t i = 0; i < rest; ++i) {
            for (int64_t k = 0; k < p; ++k) {
                const T f = factor[k * rest + i];
                subtract(&C[(behind + i) * s.n + behind + i], &factor[k * rest + i], f, rest - i);
                subtract(&w[(behind + i) * s.R], &dual[k * s.R], f, s.R);
            }
        }
    }

  private:
    T at(int64_t i, int64_t j) const { return i < j ? C[i * s.n + j] : C[j * s.n + i]; }

    static void subtract(T* a, const T* b, T factor, int64_t n) {
        for (int64_t i = 0; i < n; ++i) a[i] -= factor * b[i];
    }

    // tr w_Pᵀ (C_PP)⁻¹ w_P, by elimination.
    T cost(const int32_t* P) {
        for (int64_t i = 0; i < s.e; ++i) {
            for (int64_t j = i; j < s.e; ++j) A[i * s.e + j] = at(P[i], P[j]);
            for (int64_t r = 0; r < s.R; ++r) v[i * s.R + r] = w[P[i] * s.R + r];
        }
        T total = 0;
        for (int64_t k = 0; k < s.e; ++k) {
            const T pivot = A[k * s.e + k];
            T squares = 0;
            for (int64_t r = 0; r < s.R; ++r) squares += v[k * s.R + r] * v[k * s.R + r];
            total += squares / pivot;
            for (int64_t i = k + 1; i < s.e; ++i) {
                const T ratio = A[k * s.e + i] / pivot;
                subtract(&A[i * s.e + i], &A[k * s.e + i], ratio, s.e - i);
                subtract(&v[i * s.R], &v[k * s.R], ratio, s.R);
            }
        }
        return total;
    }

    const Sizes s;
    std::vector<T> C, w, A, v, factor, dual, L;
};

template <typename T>
void run(Sizes s, const T* C, const T* w, const int32_t* sets, const int64_t* units, const int64_t* stops, int64_t* best,
         bool one_C, bool one_sets, int threads) {
    const int64_t all = s.batches ? units[s.batches - 1] : 0, apart = all * s.c * s.e;
#pragma omp parallel num_threads(threads)
    {
        Group<T> group(s);
        std::vector<int32_t> P;
#pragma omp for schedule(static)
        for (int64_t g = 0; g < s.G; ++g) {
            group.load(C + (one_C ? 0 : g) * s.n * s.n, w + g * s.n * s.R);
            const int32_t* own = sets + (one_sets ? 0 : g) * apart;
            for (int64_t t = 0, u = 0; t < s.batches; ++t) {
                P.clear();
                for (; u < units[t]; ++u) {
                    const int64_t chosen = group.choose(own + u * s.c * s.e);
                    best[g * all + u] = chosen;
                    const int32_t* set = own + (u * s.c + chosen) * s.e;
                    P.insert(P.end(), set, set + s.e);
                }
                if (stops[t] < s.n) group.take(P, stops[t]);
            }
        }
    }
}

}  // namespace

#define EXPORT(NAME, TYPE)                                                                                             \
    extern "C" void s3lab_eliminate_##NAME(int64_t G, int64_t n, int64_t R, int64_t batches, int64_t c, int64_t e,    \
                                           const TYPE* C, const TYPE* w, const int32_t* sets, const int64_t* units,   \
                                           const int64_t* stops, int64_t* best, int one_C, int one_sets,              \
                                           int threads) {                                                             \
        run<TYPE>({G, n, R, batches, c, e}, C, w, sets, units, stops, best, one_C, one_sets, threads);                \
    }
EXPORT(float32, float)
EXPORT(float64, double)

/* What an LSTM on a CPU does between its matrix products, there and back, each in one pass over the gates. Plain C that
   compilers turn into vector instructions; `cpu.py` compiles it, and does the same with PyTorch's operators where it
   cannot.

   Matrices are rows of floats without gaps. The four gates of a row stand side by side, in PyTorch's order: input,
   forget, candidate, output, each `hidden` wide. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t num;

/* exp(x) - 1, to about one unit in the last place for x in [-87, 87] and held at its ends.
   x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) - 1 by its Taylor polynomial, whose first term left out is 3e-9 of r. */
static inline float expm1_(float x)
{
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;
    const float magic = 12582912.0f; /* 1.5 * 2^23: a sum with it has no room for a fraction */
    float shifted = x * 1.44269504f + magic;
    float n = shifted - magic;
    float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4b400000 + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r;
    return power * p + (power - 1);
}

static inline float sigmoid_(float x) { return 1 / (2 + expm1_(-x)); }

static inline float tanh_(float x)
{
    /* The sign stands apart so that neither end overflows. */
    float e = expm1_(-2 * fabsf(x));
    return copysignf(-e / (2 + e), x);
}

/* One time step. `gates` holds the input's part and both biases, and gets the gates after their nonlinearities. */
void ulimi_lstm_forward(num rows, num hidden, num threads, float *restrict gates, const float *restrict recurrent,
                        const float *restrict cell_before, float *restrict cell, float *restrict out)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (num row = 0; row < rows; row++) {
        float *restrict g = gates + row * 4 * hidden;
        const float *restrict a = recurrent + row * 4 * hidden;
        const float *restrict before = cell_before + row * hidden;
        float *restrict c = cell + row * hidden, *restrict h = out + row * hidden;
#pragma omp simd
        for (num j = 0; j < hidden; j++) {
            float in = sigmoid_(g[j] + a[j]);
            float forget = sigmoid_(g[hidden + j] + a[hidden + j]);
            float candidate = tanh_(g[2 * hidden + j] + a[2 * hidden + j]);
            float output = sigmoid_(g[3 * hidden + j] + a[3 * hidden + j]);
            float now = forget * before[j] + in * candidate;
            g[j] = in;
            g[hidden + j] = forget;
            g[2 * hidden + j] = candidate;
            g[3 * hidden + j] = output;
            c[j] = now;
            h[j] = output * tanh_(now);
        }
    }
}

/* The same step backward. `grad_a` and `grad_b` add up to the gradient of its output; `gates` gets the gradient of what
   the nonlinearities read; `grad_cell` comes as the gradient of this step's cell and leaves as that of the one before. */
void ulimi_lstm_backward(num rows, num hidden, num threads, float *restrict gates, const float *restrict cell_before,
                         const float *restrict cell, const float *restrict grad_a, const float *restrict grad_b,
                         float *restrict grad_cell)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (num row = 0; row < rows; row++) {
        float *restrict g = gates + row * 4 * hidden;
        const float *restrict before = cell_before + row * hidden, *restrict c = cell + row * hidden;
        const float *restrict da = grad_a + row * hidden, *restrict db = grad_b + row * hidden;
        float *restrict dc = grad_cell + row * hidden;
#pragma omp simd
        for (num j = 0; j < hidden; j++) {
            float in = g[j], forget = g[hidden + j], candidate = g[2 * hidden + j], output = g[3 * hidden + j];
            float squashed = tanh_(c[j]), dh = da[j] + db[j];
            float d = dc[j] + dh * output * (1 - squashed * squashed);
            g[j] = d * candidate * in * (1 - in);
            g[hidden + j] = d * before[j] * forget * (1 - forget);
            g[2 * hidden + j] = d * in * (1 - candidate * candidate);
            g[3 * hidden + j] = dh * squashed * output * (1 - output);
            dc[j] = d * forget;
        }
    }
}

/* The transpose of a (rows, columns) part of a matrix whose rows are `stride` apart, without gaps. By tiles of a cache
   line each way: PyTorch's copy misses the cache at almost each number. */
#define TILE 16
void ulimi_transpose(num rows, num columns, num stride, num threads, const float *restrict in, float *restrict out)
{
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (num j = 0; j < columns; j += TILE) {
        num width = columns - j < TILE ? columns - j : TILE;
        for (num i = 0; i < rows; i += TILE) {
            num height = rows - i < TILE ? rows - i : TILE;
            float tile[TILE][TILE];
            if (width == TILE && height == TILE) {
                for (int y = 0; y < TILE; y++)
                    for (int x = 0; x < TILE; x++)
                        tile[x][y] = in[(i + y) * stride + j + x];
                for (int x = 0; x < TILE; x++)
                    memcpy(out + (j + x) * rows + i, tile[x], sizeof tile[x]);
            } else {
                for (num y = 0; y < height; y++)
                    for (num x = 0; x < width; x++)
                        out[(j + x) * rows + i + y] = in[(i + y) * stride + j + x];
            }
        }
    }
}

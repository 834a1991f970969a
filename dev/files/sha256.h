// sha256.h: SHA-256 (FIPS 180-4), for the checksums of checkpoints, and HMAC-SHA-256, with which
// the ranks of a job authenticate each other. Portable C.
#ifndef SHA256_H
#define SHA256_H

#include "../check.h"

enum { SHA256_BYTES = 32, SHA256_HEX = 65 };             // a digest; its 64 hex digits and a NUL

typedef struct {
    uint32_t h[8];
    uint64_t bytes;           // processed so far
    unsigned char block[64];  // the last bytes % 64, waiting for a full block
} Sha256;

// FIPS 180-4, section 4.2.2: the fractional parts of the cube roots of the first 64 primes.
static const uint32_t sha256_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static inline uint32_t sha256_rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

// One round (section 6.2.2, step 3). The caller rotates the variables' names instead of moving
// their values.
#define SHA256_ROUND(a, b, c, d, e, f, g, h, k, w) do {                        \
    h += (sha256_rotate(e, 6) ^ sha256_rotate(e, 11) ^ sha256_rotate(e, 25)) + \
        (g ^ (e & (f ^ g))) + k + w;                                           \
    d += h;                                                                    \
    h += (sha256_rotate(a, 2) ^ sha256_rotate(a, 13) ^ sha256_rotate(a, 22)) + \
        ((a & b) | (c & (a | b)));                                             \
} while (0)

// Processes n whole blocks of 64 bytes.
static inline void sha256_blocks(uint32_t state[8], const unsigned char *p, size_t n) {
    for (; n > 0; n--, p += 64) {
        uint32_t w[64];
        for (int t = 0; t < 16; t++)
            w[t] = (uint32_t)p[4*t] << 24 | (uint32_t)p[4*t + 1] << 16 | (uint32_t)p[4*t + 2] << 8 |
                p[4*t + 3];
        for (int t = 16; t < 64; t++) {
            uint32_t x = w[t - 15], y = w[t - 2];
            w[t] = w[t - 16] + w[t - 7] + (sha256_rotate(x, 7) ^ sha256_rotate(x, 18) ^ x >> 3)
                                        + (sha256_rotate(y, 17) ^ sha256_rotate(y, 19) ^ y >> 10);
        }
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        for (int t = 0; t < 64; t += 8) {
            const uint32_t *k = sha256_k + t, *v = w + t;
            SHA256_ROUND(a, b, c, d, e, f, g, h, k[0], v[0]);
            SHA256_ROUND(h, a, b, c, d, e, f, g, k[1], v[1]);
            SHA256_ROUND(g, h, a, b, c, d, e, f, k[2], v[2]);
            SHA256_ROUND(f, g, h, a, b, c, d, e, k[3], v[3]);
            SHA256_ROUND(e, f, g, h, a, b, c, d, k[4], v[4]);
            SHA256_ROUND(d, e, f, g, h, a, b, c, k[5], v[5]);
            SHA256_ROUND(c, d, e, f, g, h, a, b, k[6], v[6]);
            SHA256_ROUND(b, c, d, e, f, g, h, a, k[7], v[7]);
        }
        state[0] += a; state[1] += b; state[2] += c; state[3] += d;
        state[4] += e; state[5] += f; state[6] += g; state[7] += h;
    }
}

static inline void sha256_init(Sha256 *s) {
    // Section 5.3.3: the fractional parts of the square roots of the first eight primes.
    static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memset(s, 0, sizeof *s);
    memcpy(s->h, start, sizeof start);
}

// The message may arrive in pieces of any size.
static inline void sha256_update(Sha256 *s, const void *bytes, size_t n) {
    const unsigned char *p = (const unsigned char *)bytes;
    size_t waiting = s->bytes % 64;
    if (!n) return;                                      // bytes may be NULL then
    s->bytes += n;
    if (waiting) {
        size_t take = n < 64 - waiting ? n : 64 - waiting;
        memcpy(s->block + waiting, p, take);
        if (waiting + take < 64) return;
        sha256_blocks(s->h, s->block, 1);
        p += take;
        n -= take;
    }
    sha256_blocks(s->h, p, n / 64);
    if (n % 64) memcpy(s->block, p + n / 64 * 64, n % 64);
}

// Ends the message and writes its digest.
static inline void sha256_digest(Sha256 *s, unsigned char digest[SHA256_BYTES]) {
    // section 5.1.1: a one, zeros, the length in bits
    unsigned char end[72] = {0x80};
    size_t zeros_to = (s->bytes % 64 < 56 ? 56 : 120) - s->bytes % 64;
    for (int i = 0; i < 8; i++)
        end[zeros_to + (size_t)i] = (unsigned char)(8 * s->bytes >> (56 - 8 * i));
    sha256_update(s, end, zeros_to + 8);
    for (int i = 0; i < SHA256_BYTES; i++)
        digest[i] = (unsigned char)(s->h[i / 4] >> (24 - i % 4 * 8));
}

// The same, as lower-case hex.
static inline void sha256_final(Sha256 *s, char hex[SHA256_HEX]) {
    unsigned char digest[SHA256_BYTES];
    sha256_digest(s, digest);
    for (int i = 0; i < SHA256_BYTES; i++) snprintf(hex + 2 * i, 3, "%02x", digest[i]);
}

static inline void sha256_hex(char hex[SHA256_HEX], const void *bytes, size_t n) {
    Sha256 s;
    sha256_init(&s);
    sha256_update(&s, bytes, n);
    sha256_final(&s, hex);
}

// HMAC-SHA-256 (RFC 2104) of text (n) under key (key_n), both of any length.
static inline void hmac_sha256(unsigned char mac[SHA256_BYTES], const void *key, size_t key_n,
                               const void *text, size_t n) {
    unsigned char block[64] = {0};
    Sha256 s;
    sha256_init(&s);
    if (key_n > sizeof block) sha256_update(&s, key, key_n), sha256_digest(&s, block);
    else if (key_n) memcpy(block, key, key_n);
    for (size_t i = 0; i < sizeof block; i++) block[i] ^= 0x36;
    sha256_init(&s);
    sha256_update(&s, block, sizeof block);
    sha256_update(&s, text, n);
    sha256_digest(&s, mac);
    for (size_t i = 0; i < sizeof block; i++) block[i] ^= 0x36 ^ 0x5c;
    sha256_init(&s);
    sha256_update(&s, block, sizeof block);
    sha256_update(&s, mac, SHA256_BYTES);
    sha256_digest(&s, mac);
}

// ---- The digest of a file, and marks that locate the first block that differs ----
//
// The running state at each multiple of FILE_SUM_BLOCK bytes depends on every byte before it. 32
// bits of it, stored as 8 hex digits, come for free; the first mark that differs locates the
// damaged block.

enum { FILE_SUM_BLOCK = 1 << 20 };

typedef struct {
    Sha256 sha;
    uint64_t size;         // bytes so far
    Text marks;            // of the whole blocks so far; release with text_free
    char hex[SHA256_HEX];  // after file_sum_end
} FileSum;

static inline void file_sum_init(FileSum *s) {
    memset(s, 0, sizeof *s);
    sha256_init(&s->sha);
}

static inline void file_sum_update(FileSum *s, const void *bytes, size_t n) {
    const char *p = (const char *)bytes;
    while (n) {
        const size_t free_bytes = FILE_SUM_BLOCK - (size_t)(s->size % FILE_SUM_BLOCK),
            take = n < free_bytes ? n : free_bytes;
        sha256_update(&s->sha, p, take);
        s->size += take;
        if (s->size % FILE_SUM_BLOCK == 0) text_printf(&s->marks, "%08x", (unsigned)s->sha.h[0]);
        p += take;
        n -= take;
    }
}

static inline void file_sum_end(FileSum *s) { sha256_final(&s->sha, s->hex); }

static inline void file_sum(FileSum *s, const void *bytes, size_t n) {
    file_sum_init(s);
    file_sum_update(s, bytes, n);
    file_sum_end(s);
}

// The offset of the first block that differs from the file these marks describe; the last block has
// no mark.
static inline uint64_t file_sum_differs(const FileSum *s, const char *marks) {
    size_t i = 0;
    while (i + 8 <= s->marks.n && strlen(marks) >= i + 8 && !memcmp(s->marks.s + i, marks + i, 8))
        i += 8;
    return i / 8 * FILE_SUM_BLOCK;
}

#endif

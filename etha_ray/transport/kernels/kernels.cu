// Copies, casts and checksums of many pieces of memory in one launch. table.py and sums.py make the tables that are read here.
//
// Plain C++ without includes or shared memory, and with no intrinsic but atomicAdd: nvcc, NVRTC and, in the tests, a C++ compiler for the CPU all compile
// this very text. THREADS, BATCH, TILE, DIMS and the rest in capitals come from source.py.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;

struct alignas(16) Wide {
    u64 low, high;
};

// The last of `count` ranges that begins at or before `tile`; empty ranges are not in the tables.
static __device__ u64 range_of(const u64* first, u64 count, u64 tile) {
    u64 low = 0, high = count;
    while (high - low > 1) {
        const u64 middle = (low + high) / 2;
        if (first[middle] <= tile)
            low = middle;
        else
            high = middle;
    }
    return low;
}

// ------------------------------------------------------------------------------------------------------------------ regions

// As REGION of table.py. Dimensions are innermost first, and steps are in bytes from one unit to the next.
struct Region {
    u64 source, target;
    u32 units, kind, dims, unused;
    u32 sizes[DIMS];
    s64 source_steps[DIMS], target_steps[DIMS];
};

struct Places {
    u64 source, target;
};

static __device__ Places places_of(const Region& region, u32 unit) {
    Places places = {region.source, region.target};
    u32 dim = 0;
    for (; dim + 1 < region.dims; ++dim) {
        const u32 size = region.sizes[dim], outer = unit / size, at = unit - outer * size;
        places.source += at * region.source_steps[dim];
        places.target += at * region.target_steps[dim];
        unit = outer;
    }
    places.source += unit * region.source_steps[dim];
    places.target += unit * region.target_steps[dim];
    return places;
}

// Where one thread's next BATCH units lie, and how many of them there are. Those past the end are the last one again, so that
// nothing that is loaded waits for a branch; only `count` are stored.
struct Batch {
    Places places[BATCH];
    u32 count;
};

// `Work` says what a unit is; all loads are under way before the first store.
template <typename Work>
static __device__ void done(const Batch& batch) {
    typename Work::Held held[BATCH];
#pragma unroll
    for (u32 turn = 0; turn < BATCH; ++turn) held[turn] = *reinterpret_cast<const typename Work::Held*>(batch.places[turn].source);
#pragma unroll
    for (u32 turn = 0; turn < BATCH; ++turn)
        if (turn < batch.count) Work::store(batch.places[turn].target, held[turn]);
}

template <typename Unit>
struct Move {
    typedef Unit Held;
    static __device__ void store(u64 target, const Unit& held) { *reinterpret_cast<Unit*>(target) = held; }
};

// -------------------------------------------------------------------------------------------------------------------- casts

static __device__ u32 bits_of(float value) {
    union {
        float value;
        u32 bits;
    } both;
    both.value = value;
    return both.bits;
}

static __device__ float float_of(u32 bits) {
    union {
        u32 bits;
        float value;
    } both;
    both.bits = bits;
    return both.value;
}

// Every cast goes by way of a float's bits, as torch's go by way of float, and rounds to nearest, ties to even. A NaN stays one.
// No instruction here is given a float below 2^-126, nor makes one: cupy has all code compiled with -ftz=true, by which such are zero.

struct Float32 {
    typedef u32 Bits;
    static __device__ u32 widened(Bits bits) { return bits; }
    static __device__ Bits narrowed(u32 bits) { return bits; }
};

struct Float64 {
    typedef u64 Bits;
    static __device__ u32 widened(Bits bits) {
        const u32 sign = static_cast<u32>(bits >> 32) & 0x80000000u;
        const u64 size = bits & 0x7fffffffffffffffull;
        if (size > 0x7ff0000000000000ull) return sign | 0x7fc00000u | (static_cast<u32>(size >> 29) & 0x3fffffu);
        if (size >= 0x47effffff0000000ull) return sign | 0x7f800000u;  // half way from the largest float to 2^128, and more
        if (size >= 0x3810000000000000ull)                            // 2^-126 and more
            return sign | static_cast<u32>((size - 0x3800000000000000ull + 0xfffffffull + (size >> 29 & 1u)) >> 29);
        const u32 shift = 926u - static_cast<u32>(size >> 52);  // to multiples of 2^-149, which are what there is
        if (shift > 53u) return sign;                           // less than half of one
        const u64 whole = (size & 0xfffffffffffffull) | 0x10000000000000ull, half = 1ull << (shift - 1u);
        return sign | static_cast<u32>((whole + half - 1u + (whole >> shift & 1u)) >> shift);
    }
    static __device__ Bits narrowed(u32 bits) {
        const u64 sign = static_cast<u64>(bits & 0x80000000u) << 32;
        const u32 size = bits & 0x7fffffffu;
        if (size > 0x7f800000u) return sign | 0x7ff8000000000000ull | static_cast<u64>(size & 0x7fffffu) << 29;
        if (size == 0x7f800000u) return sign | 0x7ff0000000000000ull;
        if (size >= 0x00800000u) return sign | (0x3800000000000000ull + (static_cast<u64>(size) << 29));
        union {
            double value;
            u64 bits;
        } both;
        both.value = static_cast<double>(size) * 1.4012984643248170709e-45;  // 2^-149: exact, and no double is that small
        return sign | both.bits;
    }
};

struct BFloat16 {
    typedef u16 Bits;
    static __device__ u32 widened(Bits bits) { return static_cast<u32>(bits) << 16; }
    static __device__ Bits narrowed(u32 bits) {
        if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<Bits>((bits >> 16) | 0x40u);
        return static_cast<Bits>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
};

struct Float16 {
    typedef u16 Bits;
    static __device__ u32 widened(Bits bits) {
        const u32 sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, fraction = bits & 0x3ffu;
        if (exponent == 31u) return sign | 0x7f800000u | fraction << 13;
        if (exponent == 0u) return sign | bits_of(static_cast<float>(fraction) * 5.9604644775390625e-8f);  // 2^-24: exact
        return sign | (exponent + 112u) << 23 | fraction << 13;
    }
    static __device__ Bits narrowed(u32 bits) {
        const u32 sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
        if (size > 0x7f800000u) return static_cast<Bits>(sign | 0x7e00u | ((size >> 13) & 0x3ffu));
        if (size >= 0x477ff000u) return static_cast<Bits>(sign | 0x7c00u);  // 65520 and more
        if (size < 0x33000000u) return static_cast<Bits>(sign);             // below 2^-25, half of the smallest
        if (size < 0x38800000u)  // below 2^-14: the sum with 0.5 rounds to multiples of 2^-24, which are what there is
            return static_cast<Bits>(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000u));
        return static_cast<Bits>(sign | ((size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13));
    }
};

template <typename Bits, u32 COUNT>
struct alignas(COUNT * sizeof(Bits) > 16 ? 16 : COUNT * sizeof(Bits)) Pack {
    Bits each[COUNT];
};

template <typename From, typename To, u32 COUNT>
struct Cast {
    typedef Pack<typename From::Bits, COUNT> Held;
    static __device__ void store(u64 target, const Held& held) {
        Pack<typename To::Bits, COUNT> made;
#pragma unroll
        for (u32 place = 0; place < COUNT; ++place) made.each[place] = To::narrowed(From::widened(held.each[place]));
        *reinterpret_cast<Pack<typename To::Bits, COUNT>*>(target) = made;
    }
};

template <typename From, typename To>
static __device__ void cast(const Batch& batch, u32 kind) {
    if (kind & IN_PACKS)
        done<Cast<From, To, PACK>>(batch);
    else
        done<Cast<From, To, 1>>(batch);
}

template <typename From>
static __device__ void cast_from(const Batch& batch, u32 kind) {
    switch (kind & 3u) {
        case 0: cast<From, Float32>(batch, kind); break;
        case 1: cast<From, BFloat16>(batch, kind); break;
        case 2: cast<From, Float16>(batch, kind); break;
        default: cast<From, Float64>(batch, kind);
    }
}

// ------------------------------------------------------------------------------------------------------------------- copies

// A kind is the binary logarithm of a unit's width, or CAST with two dtypes; the whole block has the same one.
static __device__ void by_kind(const Batch& batch, u32 kind) {
    switch (kind) {
        case 0: done<Move<u8>>(batch); break;
        case 1: done<Move<u16>>(batch); break;
        case 2: done<Move<u32>>(batch); break;
        case 3: done<Move<u64>>(batch); break;
        case 4: done<Move<Wide>>(batch); break;
        default:
            switch (kind >> 2 & 3u) {
                case 0: cast_from<Float32>(batch, kind); break;
                case 1: cast_from<BFloat16>(batch, kind); break;
                case 2: cast_from<Float16>(batch, kind); break;
                default: cast_from<Float64>(batch, kind);
            }
    }
}

// Each tile is TILE units of one region; `first` is the number of tiles before each region.
extern "C" __global__ void __launch_bounds__(THREADS) copy_regions(const Region* regions, const u64* first, u64 count, u64 tiles) {
    for (u64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const u64 number = range_of(first, count, tile);
        const Region& region = regions[number];
        const u32 kind = region.kind, begin = static_cast<u32>(tile - first[number]) * TILE;
        const u32 end = region.units - begin < TILE ? region.units : begin + TILE;
        for (u32 unit = begin + threadIdx.x; unit < end; unit += THREADS * BATCH) {
            Batch batch;
            batch.count = 0;
#pragma unroll
            for (u32 turn = 0; turn < BATCH; ++turn) {
                const u32 wanted = unit + turn * THREADS;
                batch.count += wanted < end;
                batch.places[turn] = places_of(region, wanted < end ? wanted : end - 1);
            }
            by_kind(batch, kind);
        }
    }
}

// --------------------------------------------------------------------------------------------------------------------- sums

// As PIECE and EDGE of sums.py.
struct Piece {
    u64 address, index, words, message;
};

struct Edge {
    u64 message, index;
    u64 bytes[8];
};

static __device__ u64 mixed(u64 word, u64 index) {
    u64 value = word ^ (index + 1) * 0x9e3779b97f4a7c15ull;
    value = (value ^ value >> 32) * 0xd6e8feb86659fd93ull;
    value = (value ^ value >> 32) * 0xd6e8feb86659fd93ull;
    return value ^ value >> 32;
}

template <typename Part>
static __device__ u64 word_at(u64 address) {
    u64 word = 0;
#pragma unroll
    for (u32 part = 0; part < 8 / sizeof(Part); ++part)
        word |= static_cast<u64>(reinterpret_cast<const Part*>(address)[part]) << 8 * sizeof(Part) * part;
    return word;
}

template <typename Part>
static __device__ u64 sum_of(const Piece& piece, u64 begin, u64 end) {
    u64 sum = 0;
    for (u64 at = begin + threadIdx.x; at < end; at += THREADS * BATCH) {
        u64 words[BATCH];
#pragma unroll
        for (u32 turn = 0; turn < BATCH; ++turn) {
            const u64 wanted = at + turn * THREADS;
            words[turn] = word_at<Part>(piece.address + 8 * (wanted < end ? wanted : end - 1));
        }
#pragma unroll
        for (u32 turn = 0; turn < BATCH; ++turn)
            if (at + turn * THREADS < end) sum += mixed(words[turn], piece.index + at + turn * THREADS);
    }
    return sum;
}

// Adds what whole words of the pieces come to into SLOTS sums of each message; tiles are SUM_TILE words of one piece.
extern "C" __global__ void __launch_bounds__(THREADS) sum_pieces(const Piece* pieces, const u64* first, u64 count, u64 tiles, u64* sums) {
    for (u64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const u64 number = range_of(first, count, tile);
        const Piece& piece = pieces[number];
        const u64 begin = (tile - first[number]) * SUM_TILE;
        const u64 end = piece.words - begin < SUM_TILE ? piece.words : begin + SUM_TILE;
        u64 sum;
        if ((piece.address & 7) == 0)
            sum = sum_of<u64>(piece, begin, end);
        else if ((piece.address & 3) == 0)
            sum = sum_of<u32>(piece, begin, end);
        else if ((piece.address & 1) == 0)
            sum = sum_of<u16>(piece, begin, end);
        else
            sum = sum_of<u8>(piece, begin, end);
        atomicAdd(sums + piece.message * SLOTS + threadIdx.x % SLOTS, sum);
    }
}

// The same of the words that lie in several pieces, or end after their message.
extern "C" __global__ void __launch_bounds__(THREADS) sum_edges(const Edge* edges, u64 count, u64* sums) {
    for (u64 number = blockIdx.x * static_cast<u64>(THREADS) + threadIdx.x; number < count; number += static_cast<u64>(gridDim.x) * THREADS) {
        const Edge& edge = edges[number];
        u64 word = 0;
        for (u32 place = 0; place < 8; ++place)
            if (edge.bytes[place]) word |= static_cast<u64>(*reinterpret_cast<const u8*>(edge.bytes[place])) << 8 * place;
        atomicAdd(sums + edge.message * SLOTS + threadIdx.x % SLOTS, mixed(word, edge.index));
    }
}

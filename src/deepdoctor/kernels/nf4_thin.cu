// y = x W^T (+ bias) (+ u L^T) for a few rows of x and W in NF4. See nf4_thin_cuda.py for the why; here is the how.
//
// Compiled with: HALF (1: fp16, 0: bf16), TILES (of eight rows of x: 1 or 2), WARPS (that multiply), BLOCKS (of a
// multiprocessor), STAGES (spans a warp has under way), DEPENDENT (programmatic dependent launch).
// Terms: a tile is 16 rows of W, a span 256 columns of it, a round the spans of one tile that the warps of a block take
// at once, one each: they lie side by side in memory. A segment is the rounds of one tile that one block walks. One
// warp more than WARPS adds up what they leave and writes y, while they go on.

typedef unsigned short u16;
typedef unsigned int u32;

#ifndef EMULATED
#define DEVICE __device__ __forceinline__

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE u32 load_shared(u32 address) {
  u32 value;
  asm("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}
DEVICE void store_shared(u32 address, u32 value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
DEVICE void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
DEVICE void copy4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
DEVICE void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void wait_groups() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
// Barrier ``number`` of two sides: one arrives and goes on, the other waits for it.
DEVICE void arrive(int number) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(number), "n"((WARPS + 1) * 32) : "memory");
}
DEVICE void meet(int number) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(number), "n"((WARPS + 1) * 32) : "memory");
}
DEVICE void start_next() {
#if DEPENDENT
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_previous() {
#if DEPENDENT
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif
DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE u16 rounded(float value) {
  u16 bits;
  asm("cvt.rn." TYPE ".f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
DEVICE float widened(u16 bits) {
#if HALF
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  return __uint_as_float((u32)bits << 16);
#endif
}
#endif

struct Part {  // as nf4_thin_cuda.py writes it
  const unsigned char* packed;
  const unsigned char* absmax;
  const float* nested;
  const float* offset;
  const float* code;
  long long first_tile, rows, first_row;
};
struct Parts {
  Part of[4];
};

struct Stage {
  u32 words[16][32];  // the 16-byte chunks of a row in the order chunk ^ (row % 4 * 2), so that reads meet no conflict
  u32 codes[16];      // of the scales of a row's four blocks
  float factors[16];  // of the scales of a row
};

typedef Stage Ring[STAGES];

// Shared memory: rings of warps, the table of pairs at a multiple of its size, rings of the other warps, code tables.
// So the address of a pair is put together by one instruction.
const u32 PAIRS_BYTES = 256 * 32 * 4;  // two values for each byte, a copy for each lane in a bank of its own

// Where a warp's next span of a tile lies: of a lane's four rows, and of the scales of one row.
struct Source {
  const unsigned char* words[4];
  const unsigned char* scales;  // of the codes, or in the upper half of a warp of the factors
  long long number;

  DEVICE void start(const Part& part, int first, int spans, int span, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const long long row = min(first + i * 4 + lane / 8, (int)part.rows - 1);
      words[i] = part.packed + (row * spans + span) * 128 + lane % 8 * 16;
    }
    number = (long long)min(first + lane % 16, (int)part.rows - 1) * spans + span;
    scales = lane < 16 ? part.absmax : reinterpret_cast<const unsigned char*>(part.nested);
  }
  DEVICE void load(Stage& stage, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = i * 4 + lane / 8;
      copy16(&stage.words[row][(lane % 8 ^ (row % 4 * 2)) * 4], words[i]);
      words[i] += WARPS * 128;
    }
    copy4(&stage.codes[lane], scales + (lane < 16 ? number : number >> 6) * 4);  // factors follow codes
    number += WARPS;
  }
};

// The two values of byte ``number`` of a word; table: address of the pairs in this lane's bank.
DEVICE u32 values_of(u32 table, u32 word, int number) {
  const u32 at = number == 0 ? word << 7 : word >> (8 * number - 7);
  return load_shared(at & 0x7f80 | table);
}

// The value of code ``number`` of four; table: its address in shared memory.
DEVICE float code_of(u32 table, u32 codes, int number) {
  const u32 at = number == 0 ? codes << 2 : codes >> (8 * number - 2);
  return __uint_as_float(load_shared((at & 0x3fc) + table));
}

// Two neighbours of a row of 16-bit numbers, zero where they are not there.
DEVICE u32 neighbours(const u16* row, bool there, int at, int end) {
  if (!there || at >= end) return 0;
  if (end % 2 == 0) return *reinterpret_cast<const u32*>(row + at);
  return row[at] | (at + 1 < end ? (u32)row[at + 1] << 16 : 0);
}

const int RANK_STEPS = 4;  // of 16: the most that the adapter's ranks take
const int FULL = 1, EMPTY = 3;  // barriers of the two buffers of sums

extern "C" __global__ void __launch_bounds__((WARPS + 1) * 32, BLOCKS) nf4_thin(
    const u16* x, u16* out, float* partials, int* arrived, const u32* pairs, const u16* bias, const u16* u,
    const u16* lora, const Parts parts, int x_stride, int out_stride, int rows, int part_count, int tiles, int spans,
    int per_block, int slots, int rank) {
#ifndef EMULATED
  extern __shared__ __align__(128) char memory[];
#endif
  start_next();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, member = lane % 4;
  const u32 base = shared_address(memory), table_at = (base + PAIRS_BYTES - 1) / PAIRS_BYTES * PAIRS_BYTES - base;
  const int in_front = min(table_at / (u32)sizeof(Ring), WARPS);
  char* const after = memory + table_at + PAIRS_BYTES;
  float* const code_tables = reinterpret_cast<float*>(after + (WARPS - in_front) * sizeof(Ring));
  float* const sums = code_tables + part_count * 256;  // [2][WARPS][TILES][4][32]
  // Through a shuffle, which the compiler cannot see through: else it puts each address together from two parts.
  const u32 table = __shfl_sync(0xffffffff, base + table_at + lane * 4, lane);

  const int rounds = (spans + WARPS - 1) / WARPS;  // of a tile
  const int walker = blockIdx.x;
  const int begin = walker * per_block, end = min(begin + per_block, tiles * rounds);
  auto part_of = [&](int tile) {
    int number = 0;
#pragma unroll
    for (int other = 1; other < 4; other++) number += other < part_count && tile >= (int)parts.of[other].first_tile;
    return number;
  };
  // What all warps do before they need anything of the kernel before.
  auto fill_tables = [&]() {
    for (int first = warp * 32; first < 256; first += (WARPS + 1) * 32) {
      const u32 own = pairs[first + lane];
      for (int i = 0; i < 32; i++) store_shared(table + (first + i) * 128, __shfl_sync(0xffffffff, own, i));
    }
    for (int at = threadIdx.x; at < part_count * 256; at += (WARPS + 1) * 32)
      code_tables[at] = parts.of[at / 256].code[at % 256];
    __syncthreads();
    wait_for_previous();
  };
  if (warp == WARPS) {
    fill_tables();
    u32 of_u[RANK_STEPS][TILES][2];
#pragma unroll
    for (int step = 0; step < RANK_STEPS; step++)
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          of_u[step][t][half] = neighbours(u + (long long)(t * 8 + group) * rank, t * 8 + group < rows,
                                           step * 16 + half * 8 + member * 2, rank);
    for (int tile = begin / rounds, number = 0; tile * rounds < end; tile++, number++) {
      const Part& part = parts.of[part_of(tile)];
      const int first = (tile - (int)part.first_tile) * 16;
      const bool there[2] = {first + group < (int)part.rows, first + group + 8 < (int)part.rows};
      const int row = (int)part.first_row + first + group;
      u32 of_lora[RANK_STEPS][4];
#pragma unroll
      for (int step = 0; step < RANK_STEPS; step++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          of_lora[step][i] = neighbours(lora + (long long)(row + i % 2 * 8) * rank, there[i % 2],
                                        step * 16 + i / 2 * 8 + member * 2, rank);
      float add[2] = {0, 0};
      for (int i = 0; i < 2; i++)
        if (bias && there[i]) add[i] = widened(bias[row + i * 8]);

      const float* const from_warps = sums + number % 2 * WARPS * TILES * 128;
      float sum[TILES][4] = {};
      meet(FULL + number % 2);
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int other = 0; other < WARPS; other++)
            sum[t][i] += from_warps[((other * TILES + t) * 4 + i) * 32 + lane];
      if ((tile + 2) * rounds < end) arrive(EMPTY + number % 2);
      // Which blocks walk this tile: from one to the other, each with one segment of it.
      const int from = tile * rounds / per_block, to = (tile * rounds + rounds - 1) / per_block;
      if (from != to) {
        float* at = partials + (long long)tile * slots * 128 * TILES;
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (t * 8 + member * 2 + i % 2 < rows)
              __stcg(&at[((walker - from) * TILES + t) * 128 + i * 32 + lane], sum[t][i]);
        __threadfence();
        __syncwarp();
        int before = 0;
        if (lane == 0) before = atomicAdd(&arrived[tile], 1);
        if (__shfl_sync(0xffffffff, before, 0) != to - from) continue;
        // The last one adds the segments up, in their order.
        __threadfence();
        if (lane == 0) arrived[tile] = 0;
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
          for (int i = 0; i < 4; i++) sum[t][i] = 0;
#pragma unroll 1
        for (int slot = 0; slot <= to - from; slot++)
#pragma unroll
          for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++)
              if (t * 8 + member * 2 + i % 2 < rows) sum[t][i] += __ldcg(&at[(slot * TILES + t) * 128 + i * 32 + lane]);
      }
#pragma unroll
      for (int step = 0; step < RANK_STEPS; step++)
        if (step * 16 < rank)
#pragma unroll
          for (int t = 0; t < TILES; t++) multiply(sum[t], of_lora[step], of_u[step][t][0], of_u[step][t][1]);
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int t = 0; t < TILES; t++) {
          const int n = t * 8 + member * 2 + i % 2;
          if (there[i / 2] && n < rows)
            out[(long long)n * out_stride + row + i / 2 * 8] = rounded(sum[t][i] + add[i / 2]);
        }
    }
    return;
  }

  Ring& ring = *reinterpret_cast<Ring*>(
      warp < in_front ? memory + warp * sizeof(Ring) : after + (warp - in_front) * sizeof(Ring));
  int loaded = begin, load_slot = 0, load_tile = begin / rounds, load_round = begin % rounds;
  Source source;
  auto start_tile = [&]() {
    const Part& part = parts.of[part_of(load_tile)];
    source.start(part, (load_tile - (int)part.first_tile) * 16, spans, load_round * WARPS + warp, lane);
  };
  start_tile();
  auto load_next = [&]() {
    if (loaded < end) {
      if (load_round * WARPS + warp < spans) source.load(ring[load_slot], lane);
      load_slot = load_slot + 1 == STAGES ? 0 : load_slot + 1;
      loaded++;
      if (++load_round == rounds) {
        load_round = 0;
        load_tile++;
        if (loaded < end) start_tile();
      }
    }
    close_group();
  };
  for (int i = 0; i < STAGES - 1; i++) load_next();
  fill_tables();

  int tile = begin / rounds, round = begin % rounds, number = 0;
  // Of x, a lane takes 16 columns of row ``group`` of each eight; one block ahead. Rows that are not there stay zero.
  uint4 ahead[2][TILES][2] = {};
  const u16* const x_lane = x + (long long)group * x_stride + member * 16;
  auto load_x = [&](int place, const u16* from) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
      if (t * 8 + group < rows) {
        const uint4* at = reinterpret_cast<const uint4*>(from + (long long)t * 8 * x_stride);
        ahead[place][t][0] = at[0];
        ahead[place][t][1] = at[1];
      }
  };
  if (round * WARPS + warp < spans) load_x(0, x_lane + (round * WARPS + warp) * 256);
  int slot = 0;
  while (tile * rounds < end) {
    const int part_number = part_of(tile);
    const Part& part = parts.of[part_number];
    const u32 code = shared_address(code_tables + part_number * 256);
    const float offset = *part.offset;
    const int last = min(rounds, end - tile * rounds);
    float sum[TILES][4] = {};
    for (; round < last; round++) {
      wait_groups<STAGES - 2>();
      __syncwarp();
      const Stage& stage = ring[slot];
      slot = slot + 1 == STAGES ? 0 : slot + 1;
      const int span = round * WARPS + warp;
      const u32 codes0 = stage.codes[group], codes1 = stage.codes[group + 8];
      const float factor0 = stage.factors[group], factor1 = stage.factors[group + 8];
      load_next();
      const int next_span = (round + 1 < rounds ? round + 1 : 0) * WARPS + warp;
      const u16 *const x_span = x_lane + span * 256, *const x_next = x_lane + next_span * 256;
      if (span < spans) {
#pragma unroll
        for (int block = 0; block < 4; block++) {
          const float scale0 = fmaf(code_of(code, codes0, block), factor0, offset);
          const float scale1 = fmaf(code_of(code, codes1, block), factor1, offset);
          // A lane takes 16 columns of rows ``group`` and ``group + 8``, in x as in W.
          const int place = (block ^ group % 4) * 8 + member * 2;
          const uint2 above = *reinterpret_cast<const uint2*>(&stage.words[group][place]);
          const uint2 below = *reinterpret_cast<const uint2*>(&stage.words[group + 8][place]);
          if (block < 3)
            load_x((block + 1) % 2, x_span + (block + 1) * 64);
          else if (next_span < spans)
            load_x(0, x_next);
          float product[TILES][4] = {};
#pragma unroll
          for (int step = 0; step < 4; step++) {
            const u32 word0 = step < 2 ? above.x : above.y, word1 = step < 2 ? below.x : below.y;
            const int byte = step % 2 * 2;
            const u32 a[4] = {
                values_of(table, word0, byte), values_of(table, word1, byte), values_of(table, word0, byte + 1),
                values_of(table, word1, byte + 1)};
#pragma unroll
            for (int t = 0; t < TILES; t++) {
              const uint4& half = ahead[block % 2][t][step / 2];
              multiply(product[t], a, step % 2 ? half.z : half.x, step % 2 ? half.w : half.y);
            }
          }
#pragma unroll
          for (int t = 0; t < TILES; t++) {
            sum[t][0] = fmaf(scale0, product[t][0], sum[t][0]);
            sum[t][1] = fmaf(scale0, product[t][1], sum[t][1]);
            sum[t][2] = fmaf(scale1, product[t][2], sum[t][2]);
            sum[t][3] = fmaf(scale1, product[t][3], sum[t][3]);
          }
        }
      } else if (next_span < spans) {
        load_x(0, x_next);
      }
      __syncwarp();
    }
    float* const for_last = sums + number % 2 * WARPS * TILES * 128;
    if (number >= 2) meet(EMPTY + number % 2);
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) for_last[((warp * TILES + t) * 4 + i) * 32 + lane] = sum[t][i];
    arrive(FULL + number % 2);
    number++;
    tile++;
    round = 0;
  }
}

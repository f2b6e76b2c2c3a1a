/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What guest/linux/units.c and its headers use of the kernel, for a user-space
 * process on x86-64. The headers of linux/ beside this file all lead here.
 *
 * Every operation is the instruction that the kernel's x86 headers emit for it:
 * the comparison with TypeScript in bench/ relies on that.
 */
#ifndef COIOMMU_SHIM_KERNEL_H
#define COIOMMU_SHIM_KERNEL_H

#include <endian.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <linux/types.h>

/* The C library defines both, the kernel only that of the machine. */
#if __BYTE_ORDER == __LITTLE_ENDIAN
#undef __BIG_ENDIAN
#endif

/* As the kernel's: a %llx fits, and the structures of the module's headers are complete. */
typedef unsigned long long u64;
typedef uint32_t u32;
typedef uint8_t u8;
typedef u64 phys_addr_t;
typedef u64 dma_addr_t;
struct page;
struct scatterlist;
struct list_head { struct list_head *next, *prev; };
struct device { void *unused; };
struct dma_map_ops { void *unused; };
enum dma_data_direction { DMA_BIDIRECTIONAL, DMA_TO_DEVICE, DMA_FROM_DEVICE };
#define CONFIG_64BIT		1
#define CONFIG_DMA_OPS		1

#define static_assert		_Static_assert
#define __packed		__attribute__((packed))
#define likely(x)		__builtin_expect(!!(x), 1)
#define unlikely(x)		__builtin_expect(!!(x), 0)
#define READ_ONCE(x)		(*(const volatile __typeof__(x) *)&(x))
#define GENMASK_ULL(h, l)	((~0ULL << (l)) & (~0ULL >> (63 - (h))))

#define WARN_ONCE(condition, ...) ({				\
	static bool warned;					\
	if ((condition) && !__atomic_exchange_n(&warned, true, __ATOMIC_RELAXED)) \
		fprintf(stderr, __VA_ARGS__);			\
})

/* A CPU is a thread. */
#define DECLARE_PER_CPU(type, name)	extern __thread type name
#define DEFINE_PER_CPU(type, name)	__thread type name
#define this_cpu_add(x, n)	((x) += (n))
#define this_cpu_inc(x)		((x)++)

/* linux/atomic.h: read-modify-writes without a suffix are full barriers, reads are relaxed. */
typedef struct { int counter; } atomic_t;
typedef struct { long counter; } atomic_long_t;

static inline int atomic_read(const atomic_t *v)
{
	return READ_ONCE(v->counter);
}

static inline int atomic_inc_return(atomic_t *v)
{
	return __atomic_add_fetch(&v->counter, 1, __ATOMIC_SEQ_CST);
}

static inline void atomic_or(int bits, atomic_t *v)
{
	__atomic_or_fetch(&v->counter, bits, __ATOMIC_SEQ_CST);
}

static inline bool atomic_try_cmpxchg(atomic_t *v, int *old, int new)
{
	return __atomic_compare_exchange_n(&v->counter, old, new, false,
					   __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* The guest's RAM, from GPA 0 on: what page_offset_base is to the kernel. */
extern char *shim_ram;

static inline void *phys_to_virt(phys_addr_t address)
{
	return shim_ram + address;
}

#endif /* COIOMMU_SHIM_KERNEL_H */

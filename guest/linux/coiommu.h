/* SPDX-License-Identifier: GPL-2.0 */
/* coIOMMU guest driver: what its files share. */
#ifndef COIOMMU_H
#define COIOMMU_H

#include <linux/dma-map-ops.h>
#include <linux/percpu.h>
#include <linux/types.h>

#include "coiommu_abi.h"

#ifndef CONFIG_64BIT
#error "coiommu counts in 64-bit per-CPU words: 64-bit kernels only"
#endif
#ifdef __BIG_ENDIAN
#error "the DMA Tracking Table is little-endian and updated in place"
#endif
#ifndef CONFIG_DMA_OPS
#error "coiommu hooks devices by their dma_map_ops: CONFIG_DMA_OPS is needed"
#endif

/* debugfs.c: counters. Names are API: they are what the debugfs file shows. */

#define COIOMMU_COUNTERS(X)						\
	X(map)			/* mapping operations that succeeded */	\
	X(unmap)							\
	X(frames_mapped)	/* frames those counted up */		\
	X(frames_unmapped)						\
	X(map_failed)		/* mapping operations that failed */	\
	X(direct_failed)	/* of these: refused by dma-direct */	\
	X(saturated)		/* of these: COUNT would overflow */	\
	X(no_unit)		/* of these: frame outside the table */	\
	X(pin_refused)		/* of these: PIN did not succeed */	\
	X(pin_requests)		/* PIN requests sent */			\
	X(pin_frames)		/* frames in requests answered OK */	\
	X(pin_status_ioerr)	/* requests by other answers */		\
	X(pin_status_unsupp)						\
	X(pin_status_deverr)						\
	X(pin_status_inval)						\
	X(pin_status_range)						\
	X(pin_status_noent)						\
	X(pin_status_fault)						\
	X(pin_status_nomem)						\
	X(pin_status_unknown)						\
	X(pin_not_seen)		/* OK, but a frame lacked P */		\
	X(pin_lost)		/* no answer in time, or vq broken */	\
	X(pin_off)		/* no device that answers */		\
	X(underflow)		/* unmap of a frame with COUNT 0 */	\
	X(bounced)		/* buffers that went through SWIOTLB */	\
	X(alloc)		/* of map: alloc and alloc_pages */	\
	X(free)								\
	X(sync)								\
	X(map_resource)

struct coiommu_counters {
#define COIOMMU_COUNTER_FIELD(name) u64 name;
	COIOMMU_COUNTERS(COIOMMU_COUNTER_FIELD)
#undef COIOMMU_COUNTER_FIELD
};

DECLARE_PER_CPU(struct coiommu_counters, coiommu_counters);

#define coiommu_add(name, n)	this_cpu_add(coiommu_counters.name, n)
#define coiommu_count(name)	this_cpu_inc(coiommu_counters.name)

void coiommu_debugfs_init(bool selftest);
void coiommu_debugfs_exit(void);

/* table.c: the DMA Tracking Table. abi.md section 1. */

struct coiommu_dtt_usage {
	u64 live_frames;	/* COUNT != 0 */
	u64 live_refs;		/* sum of COUNT */
	u64 pinned_frames;	/* P set */
	unsigned long table_pages;
	unsigned int levels;	/* 0: there is no table */
};

int coiommu_dtt_create(void);
void coiommu_dtt_destroy(void);
phys_addr_t coiommu_dtt_root(void);
unsigned int coiommu_dtt_levels(void);
void coiommu_dtt_mark_writable(bool on);
void coiommu_dtt_forget_pins(void);
int coiommu_dtt_for_each_live(int (*func)(const u64 *gfns, unsigned int nr, void *arg), void *arg);
void coiommu_dtt_usage(struct coiommu_dtt_usage *usage);

/* units.c: counting. abi.md section 2. */

int coiommu_dtt_get(u64 gfn, u64 nr, bool write, bool *ask);
u64 coiommu_dtt_put(u64 gfn, u64 nr, bool written);
bool coiommu_dtt_pinned(u64 gfn);

/* dma_ops.c: the DMA API of a hooked function */

extern const struct dma_map_ops coiommu_dma_ops;

/**
 * struct coiommu_hook - what stands between a driver and dma-direct
 * @ops: where dev->dma_ops points; container_of() leads from it to the hook
 * @shadow: has the DMA attributes of @dev and no dma_ops, so that the exported
 *	DMA API called with it is dma-direct with SWIOTLB, none of which a
 *	module can call by name
 * @dev: the PCI function
 * @endpoint: abi.md section 3, "PIN request"
 * @node: in the list of hooks.c
 */
struct coiommu_hook {
	struct dma_map_ops ops;
	struct device shadow;
	struct device *dev;
	u32 endpoint;
	struct list_head node;
};

/* The part of them that counts and asks; @sgl has the addresses that the device gets. */
int coiommu_track(struct coiommu_hook *hook, dma_addr_t addr, size_t size,
		  enum dma_data_direction dir);
void coiommu_untrack(struct coiommu_hook *hook, dma_addr_t addr, size_t size,
		     enum dma_data_direction dir);
int coiommu_track_sg(struct coiommu_hook *hook, struct scatterlist *sgl, int nents,
		     enum dma_data_direction dir);
void coiommu_untrack_sg(struct coiommu_hook *hook, struct scatterlist *sgl, int nents,
			enum dma_data_direction dir);

/* hooks.c: which functions are hooked, and when */

int coiommu_hooks_init(void);
void coiommu_hooks_exit(void);
int coiommu_hooks_begin(const u8 *assigned, struct device *self);
void coiommu_hooks_end(bool on);
unsigned int coiommu_hooks_stop(void);
unsigned int coiommu_hooks_count(void);
bool coiommu_hooks_any(u32 *endpoint);

/* pin.c: PIN requests. abi.md section 3. */

/**
 * struct coiommu_channel - takes PIN requests to the device, one at a time
 * @send: give the device a request, and a tail to answer in; an errno if it cannot be given
 * @await: length that the device wrote, or -ETIMEDOUT: request and tail may be its still
 * @returned: after -ETIMEDOUT: the device has given them back by now
 *
 * Called in atomic context. ORDERING: @await and @returned acquire; what the
 * device wrote before it answered is seen after them.
 */
struct coiommu_channel {
	int (*send)(const struct virtio_iommu_req_pin *request, size_t size,
		    struct virtio_iommu_req_tail *tail);
	int (*await)(void);
	bool (*returned)(void);
};

/**
 * struct coiommu_pin - one mapping's pin requests; on the stack of the mapping
 * @endpoint: who will do the DMA
 * @error: first failure; once set, nothing more is asked
 * @status: what the device said, or 0 when it was not the device
 * @nr_frames: frames in the request that failed
 * @recovered: the device has answered an earlier request, late
 * @flags: interrupt state of the mapping's context
 */
struct coiommu_pin {
	u32 endpoint;
	int error;
	u8 status;
	bool recovered;
	u32 nr_frames;
	unsigned long flags;
};

void coiommu_pin_begin(struct coiommu_pin *pin, u32 endpoint);
void coiommu_pin_add(struct coiommu_pin *pin, u64 gfn, u64 nr);
int coiommu_pin_end(struct coiommu_pin *pin);

int coiommu_pin_open(const struct coiommu_channel *channel, u32 nr_ranges_max);
void coiommu_pin_enable(void);
void coiommu_pin_disable(void);
void coiommu_pin_close(void);

const char *coiommu_status_name(u8 status);
int coiommu_status_to_errno(u8 status);

/* viommu.c: the virtio device */

void coiommu_viommu_read_assigned(void);
int coiommu_viommu_register(void);
void coiommu_viommu_unregister(void);

/* selftest.c */

extern const struct file_operations coiommu_selftest_fops;

int coiommu_selftest_init(void);
void coiommu_selftest_exit(void);

#endif /* COIOMMU_H */

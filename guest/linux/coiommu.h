/* SPDX-License-Identifier: GPL-2.0 */
/* coIOMMU guest driver: what its files share. */
#ifndef COIOMMU_H
#define COIOMMU_H

#include <linux/dma-map-ops.h>
#include <linux/percpu.h>
#include <linux/types.h>

#include "coiommu_abi.h"

struct virtqueue;

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
	X(pin_not_seen)		/* no refusal, but a frame lacked P */		\
	X(pin_lost)		/* no answer in time, or vq broken */	\
	X(pin_off)		/* no device that answers */		\
	X(underflow)		/* unmap of a frame with COUNT 0 */	\
	X(bounced)		/* buffers that went through SWIOTLB */	\
	X(alloc)		/* of map: alloc and alloc_pages */	\
	X(free)								\
	X(sync)								\
	X(map_resource)							\
	X(map_requests)		/* MAP requests sent, by remapped functions */ \
	X(unmap_requests)						\
	X(map_refused)		/* of map_failed: MAP did not succeed */ \
	X(iova_failed)		/* of map_failed: no free address */	\
	X(remap_off)		/* of map_failed: in no domain */	\
	X(unmap_refused)	/* UNMAP requests that did not succeed */ \
	X(iova_leaked)		/* pages of addresses whose UNMAP never did */ \
	X(remap_lost)		/* ATTACH ... UNMAP without an answer in time */ \
	X(kicks)		/* notifications: what leaves the guest for requests */ \
	X(faults)		/* DMA faults that the device reported */ \
	X(bad_events)		/* events that are no such report */

struct seq_file;

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
 * @remapped: @ops are those of remap_ops.c; changes only while no driver is bound
 * @domain: that @endpoint is attached to; NULL for a remapped one: it can map nothing
 * @node: in the list of hooks.c
 */
struct coiommu_hook {
	struct dma_map_ops ops;
	struct device shadow;
	struct device *dev;
	u32 endpoint;
	bool remapped;
	struct coiommu_domain *domain;
	struct list_head node;
};

#define coiommu_to_hook(dev)	container_of((dev)->dma_ops, struct coiommu_hook, ops)

/* The part of them that maps with dma-direct, and only counts when that fails. */
dma_addr_t coiommu_direct_map_page(struct coiommu_hook *hook, struct page *page,
				   unsigned long offset, size_t size,
				   enum dma_data_direction dir, unsigned long attrs);
int coiommu_direct_map_sg(struct coiommu_hook *hook, struct scatterlist *sgl, int nents,
			  enum dma_data_direction dir, unsigned long attrs);

/* The part of them that counts and asks; @sgl has the addresses that the device gets. */
int coiommu_track(struct coiommu_hook *hook, dma_addr_t addr, size_t size,
		  enum dma_data_direction dir);
void coiommu_untrack(struct coiommu_hook *hook, dma_addr_t addr, size_t size,
		     enum dma_data_direction dir);
int coiommu_track_sg(struct coiommu_hook *hook, struct scatterlist *sgl, int nents,
		     enum dma_data_direction dir);
void coiommu_untrack_sg(struct coiommu_hook *hook, struct scatterlist *sgl, int nents,
			enum dma_data_direction dir);

/* fault_capable.c: whose buffers are not tracked */

bool coiommu_let_fault(struct coiommu_hook *hook);

/* hooks.c: which functions are hooked, and when */

int coiommu_hooks_init(void);
void coiommu_hooks_exit(void);
int coiommu_hooks_begin(const u8 *assigned, struct device *self);
void coiommu_hooks_end(bool on);
unsigned int coiommu_hooks_stop(void);
unsigned int coiommu_hooks_count(void);
bool coiommu_hooks_any(u32 *endpoint);
bool coiommu_hooks_any_remapped(void);
int coiommu_hooks_want_remapped(u32 first, u32 last, bool on);
void coiommu_hooks_show_remapped(struct seq_file *file);

/* requests.c: the request queue. VIRTIO 1.2 section 5.13.6. */

/**
 * struct coiommu_channel - takes requests to the device
 * @send: give the device a request, and room for its reply; an errno if it cannot be given
 * @await: length that the device wrote of one reply more, or -ETIMEDOUT: requests and
 *	replies may be its still
 * @returned: after -ETIMEDOUT: the device has given one back by now
 *
 * Called in atomic context. ORDERING: @await and @returned acquire; what the
 * device wrote before it answered is seen after them.
 */
struct coiommu_channel {
	int (*send)(const void *request, size_t size, void *reply, size_t reply_size);
	int (*await)(void);
	bool (*returned)(void);
};

/**
 * struct coiommu_turn - the queue is its owner's; on the stack, in atomic context
 * @page: one page for requests and replies; NULL: there is no device that answers
 * @recovered: the device has answered requests of an earlier turn, late
 * @flags: interrupt state of the owner's context
 */
struct coiommu_turn {
	void *page;
	bool recovered;
	unsigned long flags;
};

int coiommu_await(int (*answered)(void), void (*notify)(void));

void coiommu_turn_begin(struct coiommu_turn *turn);
int coiommu_turn_send(const void *request, size_t size, void *reply, size_t reply_size);
int coiommu_turn_await(void);
void coiommu_turn_end(struct coiommu_turn *turn);
void coiommu_turn_report(const struct coiommu_turn *turn, int error);

int coiommu_requests_open(const struct coiommu_channel *channel);
void coiommu_requests_enable(void);
void coiommu_requests_disable(void);
void coiommu_requests_close(void);

/* What the tail says until the device has answered: no status of the standard. */
#define COIOMMU_UNANSWERED	0xff

const char *coiommu_status_name(u8 status);
int coiommu_status_to_errno(u8 status);

/* pin.c: PIN requests. abi.md section 3. */

/**
 * struct coiommu_pin - one mapping's pin requests; on the stack of the mapping
 * @turn: at the queue
 * @endpoint: who will do the DMA
 * @error: first failure; once set, nothing more is asked
 * @status: what the device said, or 0 when it was not the device
 * @nr_frames: frames in the request that failed
 */
struct coiommu_pin {
	struct coiommu_turn turn;
	u32 endpoint;
	int error;
	u8 status;
	u32 nr_frames;
};

void coiommu_pin_limit(u32 nr_ranges, u32 nr_frames);
void coiommu_pin_begin(struct coiommu_pin *pin, u32 endpoint);
void coiommu_pin_add(struct coiommu_pin *pin, u64 gfn, u64 nr);
int coiommu_pin_end(struct coiommu_pin *pin);

/* domain.c: domains of remapped functions. VIRTIO 1.2 sections 5.13.6.3 to 5.13.6.7. */

struct coiommu_domain;

/**
 * struct coiommu_limits - what the device says of domains; VIRTIO 1.2 section 5.13.4
 * @can_map: it has MAP and UNMAP
 * @page_size_mask: of MAP
 * @first: address that can be mapped
 * @last: inclusive
 * @domain_first: domain number
 * @domain_last: inclusive
 * @probe_size: 0: there is no PROBE
 */
struct coiommu_limits {
	bool can_map;
	u64 page_size_mask;
	u64 first;
	u64 last;
	u32 domain_first;
	u32 domain_last;
	u32 probe_size;
};

int coiommu_domains_init(bool lazy);
void coiommu_domains_exit(void);

/* In process context; create: NULL and a message when it cannot be. */
struct coiommu_domain *coiommu_domain_create(struct device *dev, u32 endpoint,
					     const struct coiommu_limits *limits);
void coiommu_domain_destroy(struct coiommu_domain *domain);

/* Everything below is in whole pages, and may be called in atomic context. */
u64 coiommu_iova_alloc(struct coiommu_domain *domain, u64 size, u64 mask);
void coiommu_iova_free(struct coiommu_domain *domain, u64 iova, u64 size);

/**
 * struct coiommu_maps - MAP requests of one mapping; on its stack
 * @turn: at the queue
 * @domain: whose
 * @flags: VIRTIO_IOMMU_MAP_F_*
 * @error: first failure; once set, nothing more is asked
 * @status: what the device said, or 0 when it was not the device
 * @nr: requests in the turn's page
 */
struct coiommu_maps {
	struct coiommu_turn turn;
	struct coiommu_domain *domain;
	u32 flags;
	int error;
	u8 status;
	unsigned int nr;
};

void coiommu_maps_begin(struct coiommu_maps *maps, struct coiommu_domain *domain, u32 flags);
void coiommu_maps_add(struct coiommu_maps *maps, u64 iova, phys_addr_t phys, u64 size);
int coiommu_maps_end(struct coiommu_maps *maps);

void coiommu_domain_unmap(struct coiommu_domain *domain, u64 iova, u64 size);
void coiommu_domain_unmap_now(struct coiommu_domain *domain, u64 iova, u64 size);
bool coiommu_domain_flush(struct coiommu_domain *domain);

/* remap_ops.c: the DMA API of a remapped function */

extern const struct dma_map_ops coiommu_remap_ops;

/* remap.c: which functions are to be remapped, by parameter and debugfs */

extern const struct file_operations coiommu_remap_fops;

int coiommu_remap_init(void);

/* device.c: the function through which the host is asked, of either kind */

/**
 * struct coiommu_device_ops - what differs between them
 * @read_assigned: have the bitmap show which functions are assigned now
 * @turn_on: give the host the table; a message and an errno if it does not take it
 * @limits: of domains
 */
struct coiommu_device_ops {
	void (*read_assigned)(u8 *assigned);
	int (*turn_on)(void);
	const struct coiommu_limits *limits;
};

int coiommu_device_claim(struct device *dev);
void coiommu_device_release(struct device *dev);
int coiommu_device_activate(const struct coiommu_device_ops *device_ops, struct device *dev,
			    struct device *own);
void coiommu_device_read_assigned(void);
const struct coiommu_limits *coiommu_device_limits(void);

/* crosvm.c: the crosvm-compatible function */

int coiommu_crosvm_register(void);
void coiommu_crosvm_unregister(void);

/* viommu.c: the virtio device */

int coiommu_viommu_register(void);
void coiommu_viommu_unregister(void);

/* faults.c: the event queue of the virtio device */

int coiommu_faults_open(struct virtqueue *vq);
void coiommu_faults_start(void);
void coiommu_faults_stop(void);
void coiommu_faults_close(void);

/* selftest.c */

extern const struct file_operations coiommu_selftest_fops;

struct seq_buf;

int coiommu_selftest_init(void);
void coiommu_selftest_exit(void);

/* selftest_remap.c */

int coiommu_selftest_remap(char **words, unsigned int nr, enum dma_data_direction dir,
			   struct seq_buf *out);

#endif /* COIOMMU_H */

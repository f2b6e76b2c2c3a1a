// SPDX-License-Identifier: GPL-2.0
/*
 * The DMA API of a hooked function: dma-direct does the mapping, through the
 * shadow device (see struct coiommu_hook), and the table counts it.
 *
 * What is counted are the frames of the address that the device gets, not of
 * the caller's page: with SWIOTLB they differ, and the device touches the slot.
 *
 * A mapping is all or nothing: when a frame cannot be pinned, its counts are
 * taken back and the caller sees a failure that it may retry.
 */
#include <linux/dma-direct.h>
#include <linux/irqflags.h>
#include <linux/mm.h>
#include <linux/pfn.h>
#include <linux/scatterlist.h>

#include "coiommu.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

static inline phys_addr_t device_sees(struct coiommu_hook *hook, dma_addr_t addr)
{
	return dma_to_phys(&hook->shadow, addr);
}

static inline u64 first_gfn(struct coiommu_hook *hook, dma_addr_t addr)
{
	return PHYS_PFN(device_sees(hook, addr));
}

/* dma-direct keeps the offset in the page, so @addr tells it without translation. */
static inline u64 nr_frames(dma_addr_t addr, size_t size)
{
	return PFN_UP((u64)offset_in_page(addr) + size);
}

static inline bool device_writes(enum dma_data_direction dir)
{
	return dir != DMA_TO_DEVICE;
}

static int pin(struct coiommu_hook *hook, u64 gfn, u64 nr)
{
	struct coiommu_pin pin;

	coiommu_pin_begin(&pin, hook->endpoint);
	coiommu_pin_add(&pin, gfn, nr);
	return coiommu_pin_end(&pin);
}

int coiommu_track(struct coiommu_hook *hook, dma_addr_t addr, size_t size,
		  enum dma_data_direction dir)
{
	u64 gfn = first_gfn(hook, addr);
	u64 nr = nr_frames(addr, size);
	bool ask = false;
	int ret;

	ret = coiommu_dtt_get(gfn, nr, device_writes(dir), &ask);
	if (unlikely(ret))
		goto failed;
	if (unlikely(ask)) {
		ret = pin(hook, gfn, nr);
		if (ret) {
			coiommu_dtt_put(gfn, nr, false);
			goto failed;
		}
	}
	coiommu_count(map);
	coiommu_add(frames_mapped, nr);
	trace_coiommu_map(hook, addr, size, 0);
	return 0;
failed:
	coiommu_count(map_failed);
	return ret;
}

void coiommu_untrack(struct coiommu_hook *hook, dma_addr_t addr, size_t size,
		     enum dma_data_direction dir)
{
	u64 done;

	trace_coiommu_unmap(hook, addr, size, 0);
	done = coiommu_dtt_put(first_gfn(hook, addr), nr_frames(addr, size), device_writes(dir));
	coiommu_count(unmap);
	coiommu_add(frames_unmapped, done);
}

/* Interrupts are off, because their handlers map and unmap: see trace.h. */
static noinline void trace_sg(struct coiommu_hook *hook, struct scatterlist *sgl, int nents,
			      bool map)
{
	struct scatterlist *sg;
	unsigned long flags;
	int i;

	local_irq_save(flags);
	for_each_sg(sgl, sg, nents, i)
		if (map)
			trace_coiommu_map(hook, sg_dma_address(sg), sg_dma_len(sg), nents - 1 - i);
		else
			trace_coiommu_unmap(hook, sg_dma_address(sg), sg_dma_len(sg), nents - 1 - i);
	local_irq_restore(flags);
}

static u64 put_sg(struct coiommu_hook *hook, struct scatterlist *sgl, int nents, bool written)
{
	struct scatterlist *sg;
	u64 done = 0;
	int i;

	for_each_sg(sgl, sg, nents, i)
		done += coiommu_dtt_put(first_gfn(hook, sg_dma_address(sg)),
					nr_frames(sg_dma_address(sg), sg_dma_len(sg)), written);
	return done;
}

/* All frames of the list that lack P go into one request, if they fit. */
static int pin_sg(struct coiommu_hook *hook, struct scatterlist *sgl, int nents)
{
	struct coiommu_pin pin;
	struct scatterlist *sg;
	int i;

	coiommu_pin_begin(&pin, hook->endpoint);
	for_each_sg(sgl, sg, nents, i)
		coiommu_pin_add(&pin, first_gfn(hook, sg_dma_address(sg)),
				nr_frames(sg_dma_address(sg), sg_dma_len(sg)));
	return coiommu_pin_end(&pin);
}

int coiommu_track_sg(struct coiommu_hook *hook, struct scatterlist *sgl, int nents,
		     enum dma_data_direction dir)
{
	struct scatterlist *sg;
	bool ask = false;
	u64 frames = 0;
	int i, ret;

	for_each_sg(sgl, sg, nents, i) {
		dma_addr_t addr = sg_dma_address(sg);
		u64 nr = nr_frames(addr, sg_dma_len(sg));

		ret = coiommu_dtt_get(first_gfn(hook, addr), nr, device_writes(dir), &ask);
		if (unlikely(ret))
			goto failed;
		frames += nr;
	}
	if (unlikely(ask)) {
		ret = pin_sg(hook, sgl, nents);
		if (ret)
			goto failed;
	}
	coiommu_count(map);
	coiommu_add(frames_mapped, frames);
	if (trace_coiommu_map_enabled())
		trace_sg(hook, sgl, nents, true);
	return 0;
failed:
	put_sg(hook, sgl, i, false);
	coiommu_count(map_failed);
	return ret;
}

void coiommu_untrack_sg(struct coiommu_hook *hook, struct scatterlist *sgl, int nents,
			enum dma_data_direction dir)
{
	u64 done;

	if (trace_coiommu_unmap_enabled())
		trace_sg(hook, sgl, nents, false);
	done = put_sg(hook, sgl, nents, device_writes(dir));
	coiommu_count(unmap);
	coiommu_add(frames_unmapped, done);
}

/* Map with dma-direct, and track nothing. */
dma_addr_t coiommu_direct_map_page(struct coiommu_hook *hook, struct page *page,
				   unsigned long offset, size_t size,
				   enum dma_data_direction dir, unsigned long attrs)
{
	dma_addr_t addr = dma_map_page_attrs(&hook->shadow, page, offset, size, dir, attrs);

	if (unlikely(addr == DMA_MAPPING_ERROR)) {
		coiommu_count(direct_failed);
		coiommu_count(map_failed);
	}
	return addr;
}

/* The same for a list: 0, or dma-direct's errno. */
int coiommu_direct_map_sg(struct coiommu_hook *hook, struct scatterlist *sgl, int nents,
			  enum dma_data_direction dir, unsigned long attrs)
{
	struct sg_table table = { .sgl = sgl, .orig_nents = nents };
	int ret = dma_map_sgtable(&hook->shadow, &table, dir, attrs);

	if (unlikely(ret)) {
		coiommu_count(direct_failed);
		coiommu_count(map_failed);
	}
	return ret;
}

static dma_addr_t co_map_page(struct device *dev, struct page *page, unsigned long offset,
			      size_t size, enum dma_data_direction dir, unsigned long attrs)
{
	struct coiommu_hook *hook = coiommu_to_hook(dev);
	dma_addr_t addr = coiommu_direct_map_page(hook, page, offset, size, dir, attrs);

	if (unlikely(addr == DMA_MAPPING_ERROR))
		return DMA_MAPPING_ERROR;
	if (unlikely(coiommu_track(hook, addr, size, dir))) {
		dma_unmap_page_attrs(&hook->shadow, addr, size, dir,
				     attrs | DMA_ATTR_SKIP_CPU_SYNC);
		return DMA_MAPPING_ERROR;
	}
	if (device_sees(hook, addr) != page_to_phys(page) + offset)
		coiommu_count(bounced);
	return addr;
}

static void co_unmap_page(struct device *dev, dma_addr_t addr, size_t size,
			  enum dma_data_direction dir, unsigned long attrs)
{
	struct coiommu_hook *hook = coiommu_to_hook(dev);

	coiommu_untrack(hook, addr, size, dir);
	dma_unmap_page_attrs(&hook->shadow, addr, size, dir, attrs);
}

/*
 * -ENOMEM for every refusal: by the contract of dma_map_sgtable() it is the one
 * after which a caller tries again. Errors of dma-direct are passed on, because
 * -EREMOTEIO must not be retried.
 */
static int co_map_sg(struct device *dev, struct scatterlist *sgl, int nents,
		     enum dma_data_direction dir, unsigned long attrs)
{
	struct coiommu_hook *hook = coiommu_to_hook(dev);
	struct scatterlist *sg;
	int i, ret;

	ret = coiommu_direct_map_sg(hook, sgl, nents, dir, attrs);
	if (unlikely(ret))
		return ret;
	if (unlikely(coiommu_track_sg(hook, sgl, nents, dir))) {
		dma_unmap_sg_attrs(&hook->shadow, sgl, nents, dir, attrs | DMA_ATTR_SKIP_CPU_SYNC);
		return -ENOMEM;
	}
	for_each_sg(sgl, sg, nents, i)
		if (device_sees(hook, sg_dma_address(sg)) != sg_phys(sg))
			coiommu_count(bounced);
	return nents;
}

/*
 * dma-direct never merges entries, and maps none by bus address because the
 * shadow is no PCI device: so each of the @nents entries was counted.
 */
static void co_unmap_sg(struct device *dev, struct scatterlist *sgl, int nents,
			enum dma_data_direction dir, unsigned long attrs)
{
	struct coiommu_hook *hook = coiommu_to_hook(dev);

	coiommu_untrack_sg(hook, sgl, nents, dir);
	dma_unmap_sg_attrs(&hook->shadow, sgl, nents, dir, attrs);
}

/* dma-direct allocates whole pages. */
static int track_alloc(struct coiommu_hook *hook, dma_addr_t addr, size_t size,
		       enum dma_data_direction dir)
{
	int ret = coiommu_track(hook, addr, PAGE_ALIGN(size), dir);

	if (!ret)
		coiommu_count(alloc);
	return ret;
}

static void untrack_alloc(struct coiommu_hook *hook, dma_addr_t addr, size_t size,
			  enum dma_data_direction dir)
{
	coiommu_untrack(hook, addr, PAGE_ALIGN(size), dir);
	coiommu_count(free);
}

/* A copy, unlike dma_mask, and a driver may change it at any time. */
static void refresh_coherent_mask(struct coiommu_hook *hook)
{
	hook->shadow.coherent_dma_mask = hook->dev->coherent_dma_mask;
}

static void *co_alloc(struct device *dev, size_t size, dma_addr_t *addr, gfp_t gfp,
		      unsigned long attrs)
{
	struct coiommu_hook *hook = coiommu_to_hook(dev);
	void *cpu_addr;

	refresh_coherent_mask(hook);
	cpu_addr = dma_alloc_attrs(&hook->shadow, size, addr, gfp, attrs);
	if (!cpu_addr) {
		coiommu_count(direct_failed);
		coiommu_count(map_failed);
		return NULL;
	}
	if (track_alloc(hook, *addr, size, DMA_BIDIRECTIONAL)) {
		dma_free_attrs(&hook->shadow, size, cpu_addr, *addr, attrs);
		return NULL;
	}
	return cpu_addr;
}

static void co_free(struct device *dev, size_t size, void *cpu_addr, dma_addr_t addr,
		    unsigned long attrs)
{
	struct coiommu_hook *hook = coiommu_to_hook(dev);

	untrack_alloc(hook, addr, size, DMA_BIDIRECTIONAL);
	dma_free_attrs(&hook->shadow, size, cpu_addr, addr, attrs);
}

static struct page *co_alloc_pages(struct device *dev, size_t size, dma_addr_t *addr,
				   enum dma_data_direction dir, gfp_t gfp)
{
	struct coiommu_hook *hook = coiommu_to_hook(dev);
	struct page *page;

	refresh_coherent_mask(hook);
	page = dma_alloc_pages(&hook->shadow, size, addr, dir, gfp);
	if (!page) {
		coiommu_count(direct_failed);
		coiommu_count(map_failed);
		return NULL;
	}
	if (track_alloc(hook, *addr, size, dir)) {
		dma_free_pages(&hook->shadow, size, page, *addr, dir);
		return NULL;
	}
	return page;
}

static void co_free_pages(struct device *dev, size_t size, struct page *page, dma_addr_t addr,
			  enum dma_data_direction dir)
{
	struct coiommu_hook *hook = coiommu_to_hook(dev);

	untrack_alloc(hook, addr, size, dir);
	dma_free_pages(&hook->shadow, size, page, addr, dir);
}

static void co_sync_single_for_cpu(struct device *dev, dma_addr_t addr, size_t size,
				   enum dma_data_direction dir)
{
	coiommu_count(sync);
	dma_sync_single_for_cpu(&coiommu_to_hook(dev)->shadow, addr, size, dir);
}

static void co_sync_single_for_device(struct device *dev, dma_addr_t addr, size_t size,
				      enum dma_data_direction dir)
{
	coiommu_count(sync);
	dma_sync_single_for_device(&coiommu_to_hook(dev)->shadow, addr, size, dir);
}

static void co_sync_sg_for_cpu(struct device *dev, struct scatterlist *sgl, int nents,
			       enum dma_data_direction dir)
{
	coiommu_count(sync);
	dma_sync_sg_for_cpu(&coiommu_to_hook(dev)->shadow, sgl, nents, dir);
}

static void co_sync_sg_for_device(struct device *dev, struct scatterlist *sgl, int nents,
				  enum dma_data_direction dir)
{
	coiommu_count(sync);
	dma_sync_sg_for_device(&coiommu_to_hook(dev)->shadow, sgl, nents, dir);
}

static int co_mmap(struct device *dev, struct vm_area_struct *vma, void *cpu_addr, dma_addr_t addr,
		   size_t size, unsigned long attrs)
{
	return dma_mmap_attrs(&coiommu_to_hook(dev)->shadow, vma, cpu_addr, addr, size, attrs);
}

static int co_get_sgtable(struct device *dev, struct sg_table *sgt, void *cpu_addr,
			  dma_addr_t addr, size_t size, unsigned long attrs)
{
	return dma_get_sgtable_attrs(&coiommu_to_hook(dev)->shadow, sgt, cpu_addr, addr, size, attrs);
}

/* MMIO of another device: no guest frame, nothing to pin. */
static dma_addr_t co_map_resource(struct device *dev, phys_addr_t phys, size_t size,
				  enum dma_data_direction dir, unsigned long attrs)
{
	coiommu_count(map_resource);
	return dma_map_resource(&coiommu_to_hook(dev)->shadow, phys, size, dir, attrs);
}

/* dma_direct_supported() by an exported name; the mask it leaves is refreshed before use. */
static int co_dma_supported(struct device *dev, u64 mask)
{
	return !dma_set_coherent_mask(&coiommu_to_hook(dev)->shadow, mask);
}

static u64 co_get_required_mask(struct device *dev)
{
	return dma_get_required_mask(&coiommu_to_hook(dev)->shadow);
}

static size_t co_max_mapping_size(struct device *dev)
{
	return dma_max_mapping_size(&coiommu_to_hook(dev)->shadow);
}

/*
 * Unset on purpose: unmap_resource (nothing to undo), alloc_noncontiguous (the
 * core falls back to alloc_pages), opt_mapping_size and get_merge_boundary
 * (dma-direct has none), flags (no P2PDMA, which dma-direct would not count).
 */
const struct dma_map_ops coiommu_dma_ops = {
	.alloc			= co_alloc,
	.free			= co_free,
	.alloc_pages		= co_alloc_pages,
	.free_pages		= co_free_pages,
	.mmap			= co_mmap,
	.get_sgtable		= co_get_sgtable,
	.map_page		= co_map_page,
	.unmap_page		= co_unmap_page,
	.map_sg			= co_map_sg,
	.unmap_sg		= co_unmap_sg,
	.map_resource		= co_map_resource,
	.sync_single_for_cpu	= co_sync_single_for_cpu,
	.sync_single_for_device	= co_sync_single_for_device,
	.sync_sg_for_cpu	= co_sync_sg_for_cpu,
	.sync_sg_for_device	= co_sync_sg_for_device,
	.dma_supported		= co_dma_supported,
	.get_required_mask	= co_get_required_mask,
	.max_mapping_size	= co_max_mapping_size,
};

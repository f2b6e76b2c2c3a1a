// SPDX-License-Identifier: GPL-2.0
/*
 * The DMA API of a remapped function: each mapping gets addresses of the
 * function's domain, which MAP requests give a meaning. Nothing bounces, because
 * any frame can be given an address that the function can use.
 *
 * Counted as in the table: frames of mappings, by their addresses.
 */
#include <linux/dma-direct.h>
#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/pfn.h>
#include <linux/scatterlist.h>

#include "coiommu.h"

static inline u64 pages_of(u64 addr, u64 size)
{
	return PAGE_ALIGN(offset_in_page(addr) + size);
}

static u32 flags_of(enum dma_data_direction dir)
{
	switch (dir) {
	case DMA_TO_DEVICE:
		return VIRTIO_IOMMU_MAP_F_READ;
	case DMA_FROM_DEVICE:
		return VIRTIO_IOMMU_MAP_F_WRITE;
	default:
		return VIRTIO_IOMMU_MAP_F_READ | VIRTIO_IOMMU_MAP_F_WRITE;
	}
}

static u64 limited(struct device *dev, u64 mask)
{
	return min_not_zero(mask, dev->bus_dma_limit);
}

static int map_failed(void)
{
	coiommu_count(map_failed);
	return -ENOMEM;
}

static void count_map(u64 size)
{
	coiommu_count(map);
	coiommu_add(frames_mapped, PHYS_PFN(size));
}

static void count_unmap(u64 size)
{
	coiommu_count(unmap);
	coiommu_add(frames_unmapped, PHYS_PFN(size));
}

static int map_at(struct coiommu_domain *domain, u64 iova, phys_addr_t phys, u64 size, u32 flags)
{
	struct coiommu_maps maps;

	coiommu_maps_begin(&maps, domain, flags);
	coiommu_maps_add(&maps, iova, phys, size);
	return coiommu_maps_end(&maps);
}

/* A mapping has failed. Some of it may have been mapped, also if the answer is lost. */
static void give_back(struct coiommu_domain *domain, u64 iova, u64 size, int error)
{
	if (error == -ENODEV)
		coiommu_iova_free(domain, iova, size);	/* nothing was sent */
	else
		coiommu_domain_unmap_now(domain, iova, size);
}

/* The host may be short of what unmaps that wait would give back. */
static bool again(struct coiommu_domain *domain, int ret)
{
	return ret == -ENOMEM && coiommu_domain_flush(domain);
}

static dma_addr_t map(struct device *dev, phys_addr_t phys, size_t size,
		      enum dma_data_direction dir, u64 mask)
{
	struct coiommu_domain *domain = coiommu_to_hook(dev)->domain;
	phys_addr_t page = phys & PAGE_MASK;
	u64 pages = pages_of(phys, size);
	u64 iova;
	int ret;

	if (unlikely(!domain)) {
		coiommu_count(remap_off);
		goto failed;
	}
	iova = coiommu_iova_alloc(domain, pages, limited(dev, mask));
	if (unlikely(!iova)) {
		coiommu_count(iova_failed);
		goto failed;
	}
	ret = map_at(domain, iova, page, pages, flags_of(dir));
	if (again(domain, ret))
		ret = map_at(domain, iova, page, pages, flags_of(dir));
	if (unlikely(ret)) {
		give_back(domain, iova, pages, ret);
		goto failed;
	}
	count_map(pages);
	return iova + offset_in_page(phys);
failed:
	map_failed();
	return DMA_MAPPING_ERROR;
}

static dma_addr_t remap_map_page(struct device *dev, struct page *page, unsigned long offset,
				 size_t size, enum dma_data_direction dir, unsigned long attrs)
{
	return map(dev, page_to_phys(page) + offset, size, dir, dma_get_mask(dev));
}

static void remap_unmap_page(struct device *dev, dma_addr_t addr, size_t size,
			     enum dma_data_direction dir, unsigned long attrs)
{
	u64 pages = pages_of(addr, size);

	count_unmap(pages);
	coiommu_domain_unmap(coiommu_to_hook(dev)->domain, addr & PAGE_MASK, pages);
}

/**
 * struct place - where segments of a list go, from 0 on
 * @end: of those so far
 * @boundary: mask of addresses that no segment may cross
 */
struct place {
	u64 end;
	u64 boundary;
};

/* The next segment's place: behind the one before, unless it would cross a boundary there. */
static u64 next_place(struct place *place, const struct scatterlist *sg)
{
	u64 size = pages_of(sg->offset, sg->length);
	u64 gap = -place->end & place->boundary;
	u64 at = place->end + (gap < size - 1 ? gap : 0);

	place->end = at + size;
	return at;
}

static struct place first_place(struct device *dev)
{
	return (struct place){ .boundary = dma_get_seg_boundary(dev) };
}

static u64 extent(struct device *dev, struct scatterlist *sgl, int nents)
{
	struct place place = first_place(dev);
	struct scatterlist *sg;
	int i;

	for_each_sg(sgl, sg, nents, i)
		next_place(&place, sg);
	return place.end;
}

static int map_sg_at(struct device *dev, u64 iova, struct scatterlist *sgl, int nents, u32 flags)
{
	struct place place = first_place(dev);
	struct coiommu_maps maps;
	struct scatterlist *sg;
	int i;

	coiommu_maps_begin(&maps, coiommu_to_hook(dev)->domain, flags);
	for_each_sg(sgl, sg, nents, i)
		coiommu_maps_add(&maps, iova + next_place(&place, sg), sg_phys(sg) & PAGE_MASK,
				 pages_of(sg->offset, sg->length));
	return coiommu_maps_end(&maps);
}

/*
 * Tell the addresses in the DMA fields of the list. What ends a page and goes on
 * in the next one is one segment for the device, as far as it can take it. The
 * first segment of length 0 ends the list for remap_unmap_sg().
 */
static int tell_sg(struct device *dev, u64 iova, struct scatterlist *sgl, int nents)
{
	unsigned int length_max = dma_get_max_seg_size(dev);
	struct place place = first_place(dev);
	struct scatterlist *sg, *told = NULL;
	int i, nr = 0;

	for_each_sg(sgl, sg, nents, i) {
		u64 addr = iova + next_place(&place, sg) + offset_in_page(sg->offset);

		if (told && sg_dma_address(told) + sg_dma_len(told) == addr &&
		    addr & place.boundary && length_max - sg_dma_len(told) >= sg->length) {
			sg_dma_len(told) += sg->length;
			continue;
		}
		told = told ? sg_next(told) : sgl;
		sg_dma_address(told) = addr;
		sg_dma_len(told) = sg->length;
		nr++;
	}
	if (nr < nents)
		sg_dma_len(sg_next(told)) = 0;
	return nr;
}

/* Of a list that tell_sg() has been at: its pages, and the end of its last segment. */
static u64 mapped_sg(struct scatterlist *sgl, int nents, u64 *end)
{
	struct scatterlist *sg;
	u64 pages = 0;
	int i;

	for_each_sg(sgl, sg, nents, i) {
		if (!sg_dma_len(sg))
			break;
		pages += pages_of(sg_dma_address(sg), sg_dma_len(sg));
		*end = sg_dma_address(sg) + sg_dma_len(sg);
	}
	return pages;
}

/* The address of the list's first page; 0 for a failure, of which @error tells. */
static u64 map_list(struct device *dev, struct scatterlist *sgl, int nents, u32 flags, int *error)
{
	struct coiommu_domain *domain = coiommu_to_hook(dev)->domain;
	u64 size = extent(dev, sgl, nents);
	u64 iova = coiommu_iova_alloc(domain, size, limited(dev, dma_get_mask(dev)));

	if (unlikely(!iova)) {
		coiommu_count(iova_failed);
		*error = -ENOSPC;
		return 0;
	}
	*error = map_sg_at(dev, iova, sgl, nents, flags);
	if (likely(!*error))
		return iova;
	give_back(domain, iova, size, *error);
	return 0;
}

/* -ENOMEM for every refusal, as in co_map_sg(). */
static int remap_map_sg(struct device *dev, struct scatterlist *sgl, int nents,
			enum dma_data_direction dir, unsigned long attrs)
{
	struct coiommu_domain *domain = coiommu_to_hook(dev)->domain;
	u64 iova, end;
	int ret;

	if (unlikely(!domain)) {
		coiommu_count(remap_off);
		return map_failed();
	}
	iova = map_list(dev, sgl, nents, flags_of(dir), &ret);
	if (again(domain, ret))
		iova = map_list(dev, sgl, nents, flags_of(dir), &ret);
	if (unlikely(!iova))
		return map_failed();
	ret = tell_sg(dev, iova, sgl, nents);
	count_map(mapped_sg(sgl, nents, &end));
	return ret;
}

/* One UNMAP for the whole list: it may have holes. */
static void remap_unmap_sg(struct device *dev, struct scatterlist *sgl, int nents,
			   enum dma_data_direction dir, unsigned long attrs)
{
	u64 iova = sg_dma_address(sgl) & PAGE_MASK, end = iova;

	count_unmap(mapped_sg(sgl, nents, &end));
	coiommu_domain_unmap(coiommu_to_hook(dev)->domain, iova, PAGE_ALIGN(end) - iova);
}

static void *map_alloc(struct device *dev, size_t size, dma_addr_t *addr,
		       enum dma_data_direction dir, gfp_t gfp)
{
	void *memory = alloc_pages_exact(PAGE_ALIGN(size), (gfp & ~__GFP_COMP) | __GFP_ZERO);

	if (!memory) {
		map_failed();
		return NULL;
	}
	*addr = map(dev, virt_to_phys(memory), PAGE_ALIGN(size), dir, dev->coherent_dma_mask);
	if (*addr == DMA_MAPPING_ERROR) {
		free_pages_exact(memory, PAGE_ALIGN(size));
		return NULL;
	}
	coiommu_count(alloc);
	return memory;
}

/* At once, so that no page is given to others that the device can write. */
static void unmap_free(struct device *dev, size_t size, void *memory, dma_addr_t addr)
{
	count_unmap(PAGE_ALIGN(size));
	coiommu_domain_unmap_now(coiommu_to_hook(dev)->domain, addr, PAGE_ALIGN(size));
	free_pages_exact(memory, PAGE_ALIGN(size));
	coiommu_count(free);
}

static void *remap_alloc(struct device *dev, size_t size, dma_addr_t *addr, gfp_t gfp,
			 unsigned long attrs)
{
	return map_alloc(dev, size, addr, DMA_BIDIRECTIONAL, gfp);
}

static void remap_free(struct device *dev, size_t size, void *cpu_addr, dma_addr_t addr,
		       unsigned long attrs)
{
	unmap_free(dev, size, cpu_addr, addr);
}

static struct page *remap_alloc_pages(struct device *dev, size_t size, dma_addr_t *addr,
				      enum dma_data_direction dir, gfp_t gfp)
{
	void *memory = map_alloc(dev, size, addr, dir, gfp);

	return memory ? virt_to_page(memory) : NULL;
}

static void remap_free_pages(struct device *dev, size_t size, struct page *page, dma_addr_t addr,
			     enum dma_data_direction dir)
{
	unmap_free(dev, size, page_address(page), addr);
}

/* What dma-direct would have told as the address of what we have allocated. */
static dma_addr_t direct(struct coiommu_hook *hook, void *cpu_addr)
{
	return phys_to_dma(&hook->shadow, virt_to_phys(cpu_addr));
}

static int remap_mmap(struct device *dev, struct vm_area_struct *vma, void *cpu_addr,
		      dma_addr_t addr, size_t size, unsigned long attrs)
{
	struct coiommu_hook *hook = coiommu_to_hook(dev);

	return dma_mmap_attrs(&hook->shadow, vma, cpu_addr, direct(hook, cpu_addr), size, attrs);
}

static int remap_get_sgtable(struct device *dev, struct sg_table *sgt, void *cpu_addr,
			     dma_addr_t addr, size_t size, unsigned long attrs)
{
	struct coiommu_hook *hook = coiommu_to_hook(dev);

	return dma_get_sgtable_attrs(&hook->shadow, sgt, cpu_addr, direct(hook, cpu_addr), size,
				     attrs);
}

/*
 * Unset on purpose: sync (caches are coherent: see check_limits() in domain.c, and
 * nothing bounces), map_resource (MAP without MMIO is for memory alone),
 * alloc_noncontiguous (the core falls back to alloc_pages), dma_supported and
 * max_mapping_size (there is no limit), get_merge_boundary (no driver is promised
 * that segments are merged), flags (no P2PDMA).
 */
const struct dma_map_ops coiommu_remap_ops = {
	.alloc		= remap_alloc,
	.free		= remap_free,
	.alloc_pages	= remap_alloc_pages,
	.free_pages	= remap_free_pages,
	.mmap		= remap_mmap,
	.get_sgtable	= remap_get_sgtable,
	.map_page	= remap_map_page,
	.unmap_page	= remap_unmap_page,
	.map_sg		= remap_map_sg,
	.unmap_sg	= remap_unmap_sg,
};

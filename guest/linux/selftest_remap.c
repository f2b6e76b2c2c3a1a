// SPDX-License-Identifier: GPL-2.0
/*
 * The self-test of remapping: one command of selftest.c, which maps and unmaps a
 * list for a function that does not exist, and shows what the device was asked
 * for and what the function's driver was told. The device says OK to everything.
 */
#include <linux/dma-mapping.h>
#include <linux/mm.h>
#include <linux/pfn.h>
#include <linux/scatterlist.h>
#include <linux/seq_buf.h>
#include <linux/slab.h>

#include "coiommu.h"

#define PROBE_SIZE	64

/* Protected by the lock of selftest.c. */
static struct seq_buf *shown;
static u64 hole_start, hole_end;
static unsigned int unanswered;

static int say_ok(const void *request, size_t size, void *reply, size_t reply_size)
{
	struct virtio_iommu_req_tail *tail = reply + reply_size - sizeof(*tail);
	const u8 *bytes = request;
	size_t i;

	seq_buf_printf(shown, "request ");
	for (i = 0; i < size; i++)
		seq_buf_printf(shown, "%02x", bytes[i]);
	seq_buf_printf(shown, "\n");
	if (bytes[0] == VIRTIO_IOMMU_T_PROBE) {
		struct virtio_iommu_probe_resv_mem *mem = reply;

		mem->head.type = cpu_to_le16(VIRTIO_IOMMU_PROBE_T_RESV_MEM);
		mem->head.length = cpu_to_le16(sizeof(*mem) - sizeof(mem->head));
		mem->subtype = VIRTIO_IOMMU_RESV_MEM_T_RESERVED;
		mem->start = cpu_to_le64(hole_start);
		mem->end = cpu_to_le64(hole_end);
	}
	tail->status = VIRTIO_IOMMU_S_OK;
	unanswered++;
	return 0;
}

static int answered(void)
{
	unanswered--;
	return sizeof(struct virtio_iommu_req_tail);
}

static bool returned(void)
{
	return false;
}

static const struct coiommu_channel agreeable = {
	.send		= say_ok,
	.await		= answered,
	.returned	= returned,
};

struct pretended {
	struct device dev;
	struct device_dma_parameters parms;
	struct coiommu_hook hook;
	u64 mask;
};

static void free_pretended(struct device *dev)
{
	kfree(container_of(dev, struct pretended, dev));
}

static struct pretended *pretend(u64 boundary, unsigned int segment_max)
{
	struct pretended *function = kzalloc(sizeof(*function), GFP_KERNEL);

	if (!function)
		return NULL;
	device_initialize(&function->dev);
	function->dev.release = free_pretended;
	function->mask = DMA_BIT_MASK(64);
	function->dev.dma_mask = &function->mask;
	function->dev.dma_parms = &function->parms;
	function->parms.segment_boundary_mask = boundary;
	function->parms.max_segment_size = segment_max;
	function->hook.ops = coiommu_remap_ops;
	set_dma_ops(&function->dev, &function->hook.ops);
	return function;
}

static void map_and_unmap(struct device *dev, struct scatterlist *sgl, int nents,
			  enum dma_data_direction dir)
{
	struct scatterlist *sg;
	int i, nr = dma_map_sg(dev, sgl, nents, dir);

	seq_buf_printf(shown, "segments");
	for_each_sg(sgl, sg, nr, i)
		seq_buf_printf(shown, " %llx=%x", sg_dma_address(sg), sg_dma_len(sg));
	seq_buf_printf(shown, "\n");
	if (nr)
		dma_unmap_sg(dev, sgl, nents, dir);
	seq_buf_printf(shown, "unmapped\n");
}

/* FIRST LAST HOLE_START HOLE_END BOUNDARY SEGMENT_MAX, then GFN OFFSET SIZE of pieces in RAM */
int coiommu_selftest_remap(char **words, unsigned int nr, enum dma_data_direction dir,
			   struct seq_buf *out)
{
	struct coiommu_limits limits = {
		.can_map = true,
		.page_size_mask = PAGE_MASK,
		.domain_last = U32_MAX,
		.probe_size = PROBE_SIZE,
	};
	u64 numbers[64], boundary;
	struct pretended *function;
	struct scatterlist *sgl;
	unsigned int i, nents;
	int ret = 0;

	if (nr < 9 || nr % 3 || nr > ARRAY_SIZE(numbers))
		return -EINVAL;
	for (i = 0; i < nr && !ret; i++)
		ret = kstrtou64(words[i], 0, &numbers[i]);
	if (ret)
		return ret;
	limits.first = numbers[0];
	limits.last = numbers[1];
	hole_start = numbers[2];
	hole_end = numbers[3];
	boundary = numbers[4];
	nents = nr / 3 - 2;
	sgl = kcalloc(nents, sizeof(*sgl), GFP_KERNEL);
	if (!sgl)
		return -ENOMEM;
	sg_init_table(sgl, nents);
	for (i = 0; i < nents && !ret; i++) {
		u64 *piece = &numbers[6 + 3 * i];

		if (!pfn_valid(piece[0]) || piece[1] >= PAGE_SIZE || !piece[2] ||
		    piece[2] > SZ_1M || !pfn_valid(piece[0] + PHYS_PFN(piece[1] + piece[2])))
			ret = -ERANGE;
		else
			sg_set_page(&sgl[i], pfn_to_page(piece[0]), piece[2], piece[1]);
	}
	function = ret ? NULL : pretend(boundary, numbers[5]);
	if (!ret && !function)
		ret = -ENOMEM;
	if (ret)
		goto free;

	shown = out;
	coiommu_requests_disable();
	coiommu_requests_close();
	ret = coiommu_requests_open(&agreeable);
	if (!ret) {
		coiommu_requests_enable();
		function->hook.domain = coiommu_domain_create(&function->dev, 0x20, &limits);
		if (function->hook.domain) {
			map_and_unmap(&function->dev, sgl, nents, dir);
			coiommu_domain_destroy(function->hook.domain);
		} else {
			ret = -ENODEV;
		}
		coiommu_requests_disable();
		coiommu_requests_close();
	}
	put_device(&function->dev);
free:
	kfree(sgl);
	return ret;
}

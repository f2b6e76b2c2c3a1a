// SPDX-License-Identifier: GPL-2.0
/*
 * Fault-capable functions: the host pins their buffers when they touch them, so
 * streaming mappings need no counting. What they cannot fault on, their rings
 * and tables, comes from the allocators, and is counted as everybody's.
 *
 * Both sides must agree: a function that is named here and cannot fault has its
 * DMA refused; one that is not named is tracked, and never faults.
 */
#include <linux/module.h>
#include <linux/pci.h>

#include "coiommu.h"

#define FUNCTIONS_MAX	16

static char *functions[FUNCTIONS_MAX];
static unsigned int nr_functions;
module_param_array_named(fault_capable, functions, charp, &nr_functions, 0444);
MODULE_PARM_DESC(fault_capable,
		 "Functions, as 0000:00:04.0,..., that may fault on their buffers: only what they allocate is tracked");

static dma_addr_t co_map_page(struct device *dev, struct page *page, unsigned long offset,
			      size_t size, enum dma_data_direction dir, unsigned long attrs)
{
	return coiommu_direct_map_page(coiommu_to_hook(dev), page, offset, size, dir, attrs);
}

static void co_unmap_page(struct device *dev, dma_addr_t addr, size_t size,
			  enum dma_data_direction dir, unsigned long attrs)
{
	dma_unmap_page_attrs(&coiommu_to_hook(dev)->shadow, addr, size, dir, attrs);
}

static int co_map_sg(struct device *dev, struct scatterlist *sgl, int nents,
		     enum dma_data_direction dir, unsigned long attrs)
{
	return coiommu_direct_map_sg(coiommu_to_hook(dev), sgl, nents, dir, attrs) ?: nents;
}

static void co_unmap_sg(struct device *dev, struct scatterlist *sgl, int nents,
			enum dma_data_direction dir, unsigned long attrs)
{
	dma_unmap_sg_attrs(&coiommu_to_hook(dev)->shadow, sgl, nents, dir, attrs);
}

static bool is_named(struct pci_dev *pdev)
{
	unsigned int i;

	for (i = 0; i < nr_functions; i++)
		if (!strcmp(functions[i], pci_name(pdev)))
			return true;
	return false;
}

/* Caller: no driver uses the function yet. */
bool coiommu_let_fault(struct coiommu_hook *hook)
{
	if (!is_named(to_pci_dev(hook->dev)))
		return false;
	hook->ops.map_page = co_map_page;
	hook->ops.unmap_page = co_unmap_page;
	hook->ops.map_sg = co_map_sg;
	hook->ops.unmap_sg = co_unmap_sg;
	dev_info(hook->dev, "coiommu: fault-capable, so its buffers are not tracked\n");
	return true;
}

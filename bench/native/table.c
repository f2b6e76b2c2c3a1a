// SPDX-License-Identifier: GPL-2.0
#include "table.h"

char *shim_ram;
struct coiommu_dtt coiommu_dtt;
DEFINE_PER_CPU(struct coiommu_counters, coiommu_counters);

/* The numbers that choose_geometry() in guest/linux/table.c derives from the levels. */
void native_table(void *ram, u64 root, unsigned int levels, unsigned int cpus)
{
	shim_ram = ram;
	coiommu_dtt.root = phys_to_virt(root);
	coiommu_dtt.levels = levels;
	coiommu_dtt.gfn_bits = COIOMMU_LEAF_BITS + COIOMMU_ENTRY_BITS * (levels - 1);
	coiommu_dtt.top_shift = coiommu_dtt.gfn_bits - COIOMMU_ENTRY_BITS;
	coiommu_dtt.count_max = COIOMMU_TU_COUNT - cpus;
}

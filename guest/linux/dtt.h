/* SPDX-License-Identifier: GPL-2.0 */
/* Inside the DMA Tracking Table: what table.c builds and units.c counts in. */
#ifndef COIOMMU_DTT_H
#define COIOMMU_DTT_H

#include <linux/bits.h>
#include <linux/io.h>

#include "coiommu.h"

#define LEAF_UNITS	(1u << COIOMMU_LEAF_BITS)
#define TABLE_ENTRIES	(1u << COIOMMU_ENTRY_BITS)
#define ENTRY_ADDRESS	GENMASK_ULL(51, 12)

struct coiommu_dtt {
	void *root;
	unsigned int levels;
	unsigned int top_shift;		/* of the root's index, if the root is no leaf */
	unsigned int gfn_bits;		/* what the levels can index */
	u32 count_max;
	bool marks_writable;		/* PIN_DIRTY is negotiated */
	atomic_long_t pages;
};

extern struct coiommu_dtt coiommu_dtt;

/* NULL: @gfn has no unit. */
atomic_t *coiommu_dtt_unit(u64 gfn);

static inline void *entry_table(u64 entry)
{
	return entry & COIOMMU_ENTRY_PRESENT ? phys_to_virt(entry & ENTRY_ADDRESS) : NULL;
}

#endif /* COIOMMU_DTT_H */

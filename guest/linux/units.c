// SPDX-License-Identifier: GPL-2.0
/*
 * Tracking units: how mappings count frames up and down, and who sees it when.
 * abi.md sections 1 and 2. This is the path of every mapping: no locks.
 */
#include <linux/atomic.h>

#include "dtt.h"

static_assert(sizeof(atomic_t) == COIOMMU_UNIT_SIZE);

/*
 * ORDERING: the address dependency through READ_ONCE() orders the load of an
 * entry before any access to the table it points to.
 * PAIRS WITH: the cmpxchg64() in make_table(), table.c.
 */
atomic_t *coiommu_dtt_unit(u64 gfn)
{
	unsigned int shift = coiommu_dtt.top_shift;
	void *table = coiommu_dtt.root;

	if (unlikely(gfn >> coiommu_dtt.gfn_bits))
		return NULL;

	for (; shift >= COIOMMU_LEAF_BITS; shift -= COIOMMU_ENTRY_BITS) {
		u64 *entries = table;

		table = entry_table(READ_ONCE(entries[(gfn >> shift) & (TABLE_ENTRIES - 1)]));
		if (unlikely(!table))
			return NULL;
	}
	return (atomic_t *)table + (gfn & (LEAF_UNITS - 1));
}

/* The unit of @gfn, given that of @gfn - 1 or NULL. */
static inline atomic_t *next_unit(atomic_t *unit, u64 gfn)
{
	return unit && (gfn & (LEAF_UNITS - 1)) ? unit + 1 : coiommu_dtt_unit(gfn);
}

/*
 * Count one mapping down; false if there is none to count.
 *
 * ORDERING: fully ordered, so the mapping's last access comes before it. The
 * loop, because subtracting from COUNT 0 would borrow from the flags.
 * PAIRS WITH: the host's claimForUnpin in src/tracking, which fails until this
 * has made COUNT 0.
 *
 * With PIN_DIRTY this is also where D is set and W cleared, in the same RMW.
 */
static inline bool put_unit(atomic_t *unit)
{
	int value = atomic_read(unit);

	do {
		if (!(value & COIOMMU_TU_COUNT))
			return false;
	} while (!atomic_try_cmpxchg(unit, &value, value - 1));
	return true;
}

/**
 * coiommu_dtt_get - count a mapping up in the units of @nr frames
 * @gfn: first frame
 * @nr: how many
 * @ask: set to true if a frame is not pinned, else left alone
 *
 * On failure no unit has changed, except for A.
 *
 * ORDERING: COUNT goes up first (fully ordered RMW); P is then tested in the
 * value which that RMW read.
 * PAIRS WITH: the host's claimForUnpin in src/tracking, one CAS of the whole
 * word: if it comes first, P is clear here and the frame is asked for; if it
 * comes second, it sees COUNT != 0 and fails. abi.md section 2.
 */
int coiommu_dtt_get(u64 gfn, u64 nr, bool *ask)
{
	atomic_t *unit = NULL;
	u64 i;
	int ret;

	for (i = 0; i < nr; i++) {
		u32 value;

		unit = next_unit(unit, gfn + i);
		if (unlikely(!unit)) {
			coiommu_count(no_unit);
			ret = -ENXIO;
			goto undo;
		}
		value = atomic_inc_return(unit);
		if (unlikely((value & COIOMMU_TU_COUNT) > coiommu_dtt.count_max)) {
			put_unit(unit);
			coiommu_count(saturated);
			ret = -EOVERFLOW;
			goto undo;
		}
		/* Only a hint for the host's ageing; COUNT protects the frame. */
		if (!(value & COIOMMU_TU_ACCESSED))
			atomic_or(COIOMMU_TU_ACCESSED, unit);
		if (!(value & COIOMMU_TU_PINNED))
			*ask = true;
	}
	return 0;
undo:
	coiommu_dtt_put(gfn, i);
	return ret;
}

/* Count a mapping down in the units of @nr frames; returns how many had one. */
u64 coiommu_dtt_put(u64 gfn, u64 nr)
{
	atomic_t *unit = NULL;
	u64 i, done = 0;

	for (i = 0; i < nr; i++) {
		unit = next_unit(unit, gfn + i);
		if (likely(unit && put_unit(unit))) {
			done++;
			continue;
		}
		coiommu_count(underflow);
		WARN_ONCE(1, "coiommu: unmap of frame 0x%llx, which is not mapped\n", gfn + i);
	}
	return done;
}

/*
 * Whether P is set now. Caller: has counted @gfn up, so that it stays set.
 *
 * ORDERING: none needed: it is read after the RMW in coiommu_dtt_get() because
 * that is fully ordered, and after the answer to a PIN request because awaiting
 * it acquires: see struct coiommu_channel.
 */
bool coiommu_dtt_pinned(u64 gfn)
{
	atomic_t *unit = coiommu_dtt_unit(gfn);

	return unit && (atomic_read(unit) & COIOMMU_TU_PINNED);
}

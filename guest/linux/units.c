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
 * W is set only with PIN_DIRTY. It becomes D in the same RMW, so that the host's
 * takeDirty sees one of them at any time; and no COUNT of 0 is left with W, at
 * which the host's claim would fail for ever.
 */
static inline bool put_unit(atomic_t *unit, bool written)
{
	int value = atomic_read(unit);
	u32 next;

	do {
		if (!(value & COIOMMU_TU_COUNT))
			return false;
		next = value - 1;
		if (unlikely(next & COIOMMU_TU_WRITABLE)) {
			if (written)
				next |= COIOMMU_TU_DIRTY;
			if (!(next & COIOMMU_TU_COUNT))
				next &= ~COIOMMU_TU_WRITABLE;
		}
	} while (!atomic_try_cmpxchg(unit, &value, next));
	return true;
}

/**
 * coiommu_dtt_get - count a mapping up in the units of @nr frames
 * @gfn: first frame
 * @nr: how many
 * @write: the device may write them
 * @ask: set to true if a frame is not pinned, else left alone
 *
 * On failure no unit has changed, except for A and, in frames that are mapped
 * otherwise too, W.
 *
 * ORDERING: COUNT goes up first (fully ordered RMW); P is then tested in the
 * value which that RMW read.
 * PAIRS WITH: the host's claimForUnpin in src/tracking, one CAS of the whole
 * word: if it comes first, P is clear here and the frame is asked for; if it
 * comes second, it sees COUNT != 0 and fails. abi.md section 2.
 *
 * ORDERING: whether W is wanted is read after COUNT went up.
 * PAIRS WITH: coiommu_dtt_mark_writable(), table.c: either this sees that it is,
 * or who turned it on sees COUNT and sets W.
 */
int coiommu_dtt_get(u64 gfn, u64 nr, bool write, bool *ask)
{
	atomic_t *unit = NULL;
	u64 i;
	int ret;

	for (i = 0; i < nr; i++) {
		u32 value, marks = COIOMMU_TU_ACCESSED;

		unit = next_unit(unit, gfn + i);
		if (unlikely(!unit)) {
			coiommu_count(no_unit);
			ret = -ENXIO;
			goto undo;
		}
		value = atomic_inc_return(unit);
		if (unlikely((value & COIOMMU_TU_COUNT) > coiommu_dtt.count_max)) {
			put_unit(unit, false);
			coiommu_count(saturated);
			ret = -EOVERFLOW;
			goto undo;
		}
		if (write && READ_ONCE(coiommu_dtt.marks_writable))
			marks |= COIOMMU_TU_WRITABLE;
		/* A is only a hint for the host's ageing; COUNT protects the frame. */
		if ((value & marks) != marks)
			atomic_or(marks, unit);
		if (!(value & COIOMMU_TU_PINNED))
			*ask = true;
	}
	return 0;
undo:
	coiommu_dtt_put(gfn, i, false);
	return ret;
}

/*
 * Count a mapping down in the units of @nr frames; returns how many had one.
 * @written: the device had the address, and might write.
 */
u64 coiommu_dtt_put(u64 gfn, u64 nr, bool written)
{
	atomic_t *unit = NULL;
	u64 i, done = 0;

	for (i = 0; i < nr; i++) {
		unit = next_unit(unit, gfn + i);
		if (likely(unit && put_unit(unit, written))) {
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

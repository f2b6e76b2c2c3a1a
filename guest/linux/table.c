// SPDX-License-Identifier: GPL-2.0
/*
 * The DMA Tracking Table: a radix tree over guest frames, shared with the host,
 * with one 32-bit tracking unit per frame. abi.md section 1.
 *
 * Maps run in atomic context, so every leaf that system RAM needs exists before
 * the first of them, and none is freed while the table is in use. That costs
 * 0.1 % of RAM. Memory that comes later gets its leaves before it goes online.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/atomic.h>
#include <linux/bitops.h>
#include <linux/gfp.h>
#include <linux/ioport.h>
#include <linux/memory.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/pfn.h>

#include "dtt.h"

static_assert(PAGE_SIZE == COIOMMU_TABLE_SIZE);
static_assert(LEAF_UNITS * COIOMMU_UNIT_SIZE == COIOMMU_TABLE_SIZE);
static_assert(TABLE_ENTRIES * COIOMMU_ENTRY_SIZE == COIOMMU_TABLE_SIZE);

struct coiommu_dtt coiommu_dtt;

/* Held while the table is created, destroyed or surveyed. Mappings need no lock. */
static DEFINE_MUTEX(dtt_lock);

/* Index of level 2 and up; level 1 is indexed by the low COIOMMU_LEAF_BITS. */
static inline unsigned int level_shift(unsigned int level)
{
	return COIOMMU_LEAF_BITS + COIOMMU_ENTRY_BITS * (level - 2);
}

static void *alloc_table(void)
{
	void *table = (void *)get_zeroed_page(GFP_KERNEL);

	if (table)
		atomic_long_inc(&coiommu_dtt.pages);
	return table;
}

static void free_table(void *table)
{
	atomic_long_dec(&coiommu_dtt.pages);
	free_page((unsigned long)table);
}

/*
 * ORDERING: the cmpxchg64() is fully ordered, hence also the release store that
 * abi.md section 1 asks for: who sees the entry sees a zeroed table.
 * PAIRS WITH: coiommu_dtt_unit(), and the host's acquire loads in its walk of the table.
 */
static void *make_table(u64 *entry)
{
	void *table = entry_table(READ_ONCE(*entry));
	u64 other;

	if (table)
		return table;
	table = alloc_table();
	if (!table)
		return NULL;
	other = cmpxchg64(entry, 0, virt_to_phys(table) | COIOMMU_ENTRY_PRESENT);
	if (other) {
		free_table(table);
		table = entry_table(other);
	}
	return table;
}

static int make_leaf(u64 gfn)
{
	void *table = coiommu_dtt.root;
	unsigned int level;

	for (level = coiommu_dtt.levels; level > 1; level--) {
		u64 *entries = table;

		table = make_table(&entries[(gfn >> level_shift(level)) & (TABLE_ENTRIES - 1)]);
		if (!table)
			return -ENOMEM;
	}
	return 0;
}

/* @last is inclusive. */
static int make_leaves(u64 first, u64 last)
{
	u64 gfn;
	int ret;

	if (last >> coiommu_dtt.gfn_bits)
		return -ERANGE;
	for (gfn = ALIGN_DOWN(first, LEAF_UNITS); gfn <= last; gfn += LEAF_UNITS) {
		ret = make_leaf(gfn);
		if (ret)
			return ret;
		cond_resched();
	}
	return 0;
}

static int make_resource_leaves(struct resource *res, void *unused)
{
	return make_leaves(PHYS_PFN(res->start), PHYS_PFN(res->end));
}

static int find_last_gfn(struct resource *res, void *last)
{
	*(u64 *)last = max_t(u64, *(u64 *)last, PHYS_PFN(res->end));
	return 0;
}

static int for_each_ram(void *arg, int (*func)(struct resource *res, void *arg))
{
	return walk_iomem_res_desc(IORES_DESC_NONE, IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY,
				   0, -1, arg, func);
}

/*
 * A mapping of memory without units would be refused every time, so such memory
 * does not go online.
 */
static int memory_changes(struct notifier_block *nb, unsigned long action, void *data)
{
	const struct memory_notify *mem = data;
	int ret;

	if (action != MEM_GOING_ONLINE)
		return NOTIFY_DONE;
	ret = make_leaves(mem->start_pfn, mem->start_pfn + mem->nr_pages - 1);
	if (ret)
		pr_err("memory at pfn 0x%lx must stay offline: the tracking table cannot cover it (%d)\n",
		       mem->start_pfn, ret);
	return notifier_from_errno(ret);
}

static struct notifier_block memory_nb = { .notifier_call = memory_changes };

static void destroy_tables(void *table, unsigned int level)
{
	unsigned int i;

	if (level > 1) {
		for (i = 0; i < TABLE_ENTRIES; i++) {
			void *child = entry_table(((u64 *)table)[i]);

			if (child)
				destroy_tables(child, level - 1);
		}
		cond_resched();
	}
	free_table(table);
}

static void destroy(void)
{
	unregister_memory_notifier(&memory_nb);
	destroy_tables(coiommu_dtt.root, coiommu_dtt.levels);
	coiommu_dtt.root = NULL;
}

/* Caller: the host has let go of the table (device reset), and no function is hooked. */
void coiommu_dtt_destroy(void)
{
	mutex_lock(&dtt_lock);
	if (coiommu_dtt.root)
		destroy();
	mutex_unlock(&dtt_lock);
}

static int choose_geometry(void)
{
	unsigned int bits;
	u64 last = 0;

	for_each_ram(&last, find_last_gfn);
	bits = fls64(last);
	coiommu_dtt.levels = 1;
	if (bits > COIOMMU_LEAF_BITS)
		coiommu_dtt.levels += DIV_ROUND_UP(bits - COIOMMU_LEAF_BITS, COIOMMU_ENTRY_BITS);
	coiommu_dtt.top_shift = level_shift(coiommu_dtt.levels);
	coiommu_dtt.gfn_bits = coiommu_dtt.top_shift + COIOMMU_ENTRY_BITS;
	/* Room for every CPU to count past the limit at once, before it sees that it did. */
	coiommu_dtt.count_max = COIOMMU_TU_COUNT - num_possible_cpus();
	return coiommu_dtt.levels > COIOMMU_LEVELS_MAX ? -ERANGE : 0;
}

/*
 * There is one table as long as the module is loaded: functions may be hooked
 * while no device is there.
 */
int coiommu_dtt_create(void)
{
	int ret = 0;

	mutex_lock(&dtt_lock);
	if (coiommu_dtt.root)
		goto out;
	ret = choose_geometry();
	if (ret)
		goto out;
	ret = -ENOMEM;
	coiommu_dtt.root = alloc_table();
	if (!coiommu_dtt.root)
		goto out;
	ret = register_memory_notifier(&memory_nb);
	if (!ret)
		ret = for_each_ram(NULL, make_resource_leaves);
	if (ret)
		destroy();
out:
	mutex_unlock(&dtt_lock);
	return ret;
}

phys_addr_t coiommu_dtt_root(void)
{
	return virt_to_phys(coiommu_dtt.root);
}

unsigned int coiommu_dtt_levels(void)
{
	return coiommu_dtt.levels;
}

struct leaf_walk {
	int (*func)(atomic_t *units, u64 gfn, struct leaf_walk *walk);
	void *arg;
	int (*live)(const u64 *gfns, unsigned int nr, void *arg);
};

static int walk_table(void *table, unsigned int level, u64 gfn, struct leaf_walk *walk)
{
	unsigned int i;
	int ret = 0;

	if (level == 1) {
		cond_resched();
		return walk->func(table, gfn, walk);
	}
	for (i = 0; i < TABLE_ENTRIES && !ret; i++) {
		void *child = entry_table(READ_ONCE(((u64 *)table)[i]));

		if (child)
			ret = walk_table(child, level - 1, gfn + ((u64)i << level_shift(level)),
					 walk);
	}
	return ret;
}

/* Stops at the first leaf for which func() does not return 0. */
static int for_each_leaf(struct leaf_walk *walk)
{
	int ret = 0;

	mutex_lock(&dtt_lock);
	if (coiommu_dtt.root)
		ret = walk_table(coiommu_dtt.root, coiommu_dtt.levels, 0, walk);
	mutex_unlock(&dtt_lock);
	return ret;
}

/*
 * Whether writable mappings are to set W: with PIN_DIRTY. Mappings may be under
 * way or live that were made without: coiommu_dtt_for_each_live() finds them.
 *
 * ORDERING: the barrier is between this store and the loads of COUNT there.
 * PAIRS WITH: coiommu_dtt_get().
 */
void coiommu_dtt_mark_writable(bool on)
{
	WRITE_ONCE(coiommu_dtt.marks_writable, on);
	smp_mb();
}

static int forget_leaf(atomic_t *units, u64 gfn, struct leaf_walk *walk)
{
	unsigned int i;

	for (i = 0; i < LEAF_UNITS; i++)
		if (atomic_read(&units[i]) & COIOMMU_TU_PINNED)
			atomic_andnot(COIOMMU_TU_PINNED, &units[i]);
	return 0;
}

/*
 * Clear P everywhere. Caller: the device has been reset, so the host no longer
 * keeps P up to date, nor minds who writes it.
 */
void coiommu_dtt_forget_pins(void)
{
	struct leaf_walk walk = { .func = forget_leaf };

	for_each_leaf(&walk);
}

static int live_in_leaf(atomic_t *units, u64 gfn, struct leaf_walk *walk)
{
	u64 gfns[32];
	unsigned int i, nr = 0;
	int ret = 0;

	for (i = 0; i < LEAF_UNITS && !ret; i++) {
		if (!(atomic_read(&units[i]) & COIOMMU_TU_COUNT))
			continue;
		gfns[nr++] = gfn + i;
		if (nr == ARRAY_SIZE(gfns)) {
			ret = walk->live(gfns, nr, walk->arg);
			nr = 0;
		}
	}
	if (nr && !ret)
		ret = walk->live(gfns, nr, walk->arg);
	return ret;
}

/* @func for all frames that were mapped before the call and still are, in groups. */
int coiommu_dtt_for_each_live(int (*func)(const u64 *gfns, unsigned int nr, void *arg), void *arg)
{
	struct leaf_walk walk = { .func = live_in_leaf, .arg = arg, .live = func };

	return for_each_leaf(&walk);
}

static int use_of_leaf(atomic_t *units, u64 gfn, struct leaf_walk *walk)
{
	struct coiommu_dtt_usage *usage = walk->arg;
	unsigned int i;

	for (i = 0; i < LEAF_UNITS; i++) {
		u32 value = atomic_read(&units[i]);

		if (!value)
			continue;
		usage->live_frames += !!(value & COIOMMU_TU_COUNT);
		usage->live_refs += value & COIOMMU_TU_COUNT;
		usage->pinned_frames += !!(value & COIOMMU_TU_PINNED);
	}
	return 0;
}

/* A moving picture: mappings come and go during the walk. */
void coiommu_dtt_usage(struct coiommu_dtt_usage *usage)
{
	struct leaf_walk walk = { .func = use_of_leaf, .arg = usage };

	*usage = (struct coiommu_dtt_usage){};
	if (!coiommu_dtt.root)
		return;
	usage->levels = coiommu_dtt.levels;
	usage->table_pages = atomic_long_read(&coiommu_dtt.pages);
	for_each_leaf(&walk);
}

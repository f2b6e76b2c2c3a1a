// SPDX-License-Identifier: GPL-2.0
/*
 * /sys/kernel/debug/coiommu: counters, which are cheap to read, and what a survey
 * of the whole table finds. One "name value" a line.
 */
#include <linux/cpumask.h>
#include <linux/debugfs.h>
#include <linux/module.h>
#include <linux/seq_file.h>

#include "coiommu.h"

DEFINE_PER_CPU(struct coiommu_counters, coiommu_counters);

static struct dentry *directory;

/* All fields are u64. */
static const char * const names[] = {
#define COUNTER_NAME(name) #name,
	COIOMMU_COUNTERS(COUNTER_NAME)
#undef COUNTER_NAME
};

static_assert(sizeof(struct coiommu_counters) == ARRAY_SIZE(names) * sizeof(u64));

static int counters_show(struct seq_file *file, void *unused)
{
	u64 sums[ARRAY_SIZE(names)] = {};
	unsigned int cpu, i;

	for_each_possible_cpu(cpu) {
		const u64 *counters = (const u64 *)per_cpu_ptr(&coiommu_counters, cpu);

		for (i = 0; i < ARRAY_SIZE(names); i++)
			sums[i] += READ_ONCE(counters[i]);
	}
	for (i = 0; i < ARRAY_SIZE(names); i++)
		seq_printf(file, "%s %llu\n", names[i], sums[i]);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(counters);

static int table_show(struct seq_file *file, void *unused)
{
	struct coiommu_dtt_usage usage;

	coiommu_dtt_usage(&usage);
	seq_printf(file, "live_frames %llu\n", usage.live_frames);
	seq_printf(file, "live_refs %llu\n", usage.live_refs);
	seq_printf(file, "pinned_frames %llu\n", usage.pinned_frames);
	seq_printf(file, "levels %u\n", usage.levels);
	seq_printf(file, "table_pages %lu\n", usage.table_pages);
	seq_printf(file, "hooked %u\n", coiommu_hooks_count());
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(table);

/* debugfs_create_file() guards our file operations against removal while they run. */
void coiommu_debugfs_init(bool selftest)
{
	directory = debugfs_create_dir(KBUILD_MODNAME, NULL);
	debugfs_create_file("counters", 0400, directory, NULL, &counters_fops);
	debugfs_create_file("table", 0400, directory, NULL, &table_fops);
	if (selftest)
		debugfs_create_file("selftest", 0600, directory, NULL, &coiommu_selftest_fops);
	else
		debugfs_create_file("remap", 0600, directory, NULL, &coiommu_remap_fops);
}

void coiommu_debugfs_exit(void)
{
	debugfs_remove_recursive(directory);
}

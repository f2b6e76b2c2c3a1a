// SPDX-License-Identifier: GPL-2.0
/* Map and unmap, as dma_ops.c calls units.c. Loaded by bench/hot-path.ts. */
#include <time.h>

#include "table.h"

__attribute__((visibility("default")))
void hot_path_table(void *ram, u64 root, unsigned int levels, unsigned int cpus)
{
	native_table(ram, root, levels, cpus);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

/*
 * Map and unmap @nr frames from each of @gfns on, @loops times. Nanoseconds, or
 * -1 when a frame was not counted or not pinned.
 */
__attribute__((visibility("default")))
double hot_path(const u64 *gfns, unsigned int count, u64 nr, unsigned int loops)
{
	double start = now();
	unsigned int i, loop;
	u64 unmapped = 0;
	bool ask = false;

	for (loop = 0; loop < loops; loop++)
		for (i = 0; i < count; i++) {
			if (coiommu_dtt_get(gfns[i], nr, true, &ask))
				return -1;
			unmapped += coiommu_dtt_put(gfns[i], nr, true);
		}
	return ask || unmapped != nr * count * loops ? -1 : now() - start;
}

// SPDX-License-Identifier: GPL-2.0
/* The bare system calls of a VFIO container. Loaded by bench/vfio/pins.ts. */
#include <linux/vfio.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <time.h>

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

/* @count mappings of @bytes, @stride bytes apart. Nanoseconds, or -1 when one was refused. */
__attribute__((visibility("default")))
double vfio_map(int container, uint64_t vaddr, uint64_t iova, uint64_t bytes, uint64_t stride, unsigned int count)
{
	struct vfio_iommu_type1_dma_map map = {
		.argsz = sizeof(map), .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE, .size = bytes,
	};
	double start = now();
	unsigned int i;

	for (i = 0; i < count; i++) {
		map.vaddr = vaddr + i * stride;
		map.iova = iova + i * stride;
		if (ioctl(container, VFIO_IOMMU_MAP_DMA, &map))
			return -1;
	}
	return now() - start;
}

/* The same mappings, one call for each. */
__attribute__((visibility("default")))
double vfio_unmap(int container, uint64_t iova, uint64_t bytes, uint64_t stride, unsigned int count)
{
	double start = now();
	unsigned int i;

	for (i = 0; i < count; i++) {
		struct vfio_iommu_type1_dma_unmap unmap = {
			.argsz = sizeof(unmap), .iova = iova + i * stride, .size = bytes,
		};

		if (ioctl(container, VFIO_IOMMU_UNMAP_DMA, &unmap) || unmap.size != bytes)
			return -1;
	}
	return now() - start;
}

// SPDX-License-Identifier: GPL-2.0
/*
 * The function through which the host is asked, whichever it is: a virtio-iommu
 * (viommu.c) or the crosvm-compatible one (crosvm.c). How tracking begins is the
 * same for both.
 */
#include <linux/atomic.h>
#include <linux/cc_platform.h>
#include <linux/device.h>
#include <linux/gfp.h>

#include "coiommu.h"

static atomic_t claimed;	/* one function at a time: there is one table */
static const struct coiommu_device_ops *ops;
static u8 *assigned;		/* lives until no phase of hooks.c uses it */

int coiommu_device_claim(struct device *dev)
{
	int ret = 0;

	if (atomic_cmpxchg(&claimed, 0, 1)) {
		dev_err(dev, "there is a coIOMMU already\n");
		return -EBUSY;
	}
	if (cc_platform_has(CC_ATTR_GUEST_MEM_ENCRYPT)) {
		dev_err(dev, "guest memory is encrypted: the host could not read the table\n");
		ret = -EOPNOTSUPP;
	} else {
		/* Contiguous, and aligned to a page. */
		assigned = alloc_pages_exact(VIRTIO_IOMMU_ASSIGNED_BITMAP_SIZE,
					     GFP_KERNEL | __GFP_ZERO);
		if (!assigned)
			ret = -ENOMEM;
	}
	if (ret)
		atomic_set(&claimed, 0);
	return ret;
}

/* Caller: hooks.c is off, and the host has let go of the table. */
void coiommu_device_release(struct device *dev)
{
	unsigned int left = coiommu_hooks_count();

	if (left)
		dev_warn(dev, "%u functions can map nothing until there is a coIOMMU again\n",
			 left);
	free_pages_exact(assigned, VIRTIO_IOMMU_ASSIGNED_BITMAP_SIZE);
	assigned = NULL;
	ops = NULL;
	atomic_set(&claimed, 0);
}

/* Caller: coiommu_device_activate() has been called. */
void coiommu_device_read_assigned(void)
{
	ops->read_assigned(assigned);
}

const struct coiommu_limits *coiommu_device_limits(void)
{
	return ops->limits;
}

/*
 * What has been mapped since before an earlier device was removed has lost its
 * P, and the host may have unpinned it: see viommu_remove(). Any endpoint will
 * do. Each frame is counted up for the time, so that its P stays once set; as if
 * its device could write, because it may have been mapped without PIN_DIRTY.
 */
static int pin_live_frames(const u64 *gfns, unsigned int nr, void *endpoint)
{
	struct coiommu_pin pin;
	unsigned int i, counted;
	bool ask = false;
	int ret = 0;

	for (counted = 0; counted < nr && !ret; counted++)
		ret = coiommu_dtt_get(gfns[counted], 1, true, &ask);
	if (ret) {
		counted--;
	} else if (ask) {
		coiommu_pin_begin(&pin, *(u32 *)endpoint);
		for (i = 0; i < nr; i++)
			coiommu_pin_add(&pin, gfns[i], 1);
		ret = coiommu_pin_end(&pin);
	}
	for (i = 0; i < counted; i++)
		coiommu_dtt_put(gfns[i], 1, true);
	return ret;
}

static int turn_on(void)
{
	u32 endpoint;
	int ret = ops->turn_on();

	if (ret)
		return ret;
	coiommu_requests_enable();
	if (!coiommu_hooks_any(&endpoint))
		return 0;
	return coiommu_dtt_for_each_live(pin_live_frames, &endpoint);
}

/*
 * After success, coiommu_hooks_end(true) must follow. @own: the PCI function that
 * @dev is, or sits on.
 */
int coiommu_device_activate(const struct coiommu_device_ops *device_ops, struct device *dev,
			    struct device *own)
{
	int ret;

	ops = device_ops;
	coiommu_device_read_assigned();

	ret = coiommu_dtt_create();
	if (ret) {
		dev_err(dev, "no tracking table (%d)\n", ret);
		return ret;
	}
	ret = coiommu_hooks_begin(assigned, own) ?: turn_on();
	if (ret)
		coiommu_hooks_end(false);
	return ret;
}

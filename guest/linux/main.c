// SPDX-License-Identifier: GPL-2.0
/*
 * coIOMMU guest driver: tells the host which guest frames devices may touch, so
 * that it pins only those. docs/abi.md is the contract with the host.
 */
#include <linux/module.h>

#include "coiommu.h"

/* Read-only: what was loaded for work never tests itself. */
static bool selftest;
module_param(selftest, bool, 0444);
MODULE_PARM_DESC(selftest, "Track nothing; instead, test the counting by a debugfs file");

static bool lazy;
module_param(lazy, bool, 0444);
MODULE_PARM_DESC(lazy, "Remapped functions: UNMAP later, many at once; faster, and not as safe");

static bool crosvm;
module_param(crosvm, bool, 0444);
MODULE_PARM_DESC(crosvm, "Drive the crosvm-compatible PCI function instead of a virtio-iommu");

static int __init start_tracking(void)
{
	int ret;

	ret = coiommu_remap_init() ?: coiommu_hooks_init();
	if (ret)
		return ret;
	ret = crosvm ? coiommu_crosvm_register() : coiommu_viommu_register();
	if (ret)
		coiommu_hooks_exit();
	return ret;
}

/* Nothing is hooked: each hook holds a reference to the module. */
static void __exit stop_tracking(void)
{
	if (crosvm)
		coiommu_crosvm_unregister();
	else
		coiommu_viommu_unregister();
	coiommu_hooks_exit();
}

static int __init coiommu_init(void)
{
	int ret;

	ret = coiommu_domains_init(lazy);
	if (ret)
		return ret;
	ret = selftest ? coiommu_selftest_init() : start_tracking();
	if (ret)
		coiommu_domains_exit();
	else
		coiommu_debugfs_init(selftest);
	return ret;
}

static void __exit coiommu_exit(void)
{
	coiommu_debugfs_exit();
	if (selftest)
		coiommu_selftest_exit();
	else
		stop_tracking();
	coiommu_domains_exit();
	coiommu_dtt_destroy();
}

module_init(coiommu_init);
module_exit(coiommu_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("coIOMMU: cooperative tracking of DMA buffers");

// SPDX-License-Identifier: GPL-2.0
/*
 * coIOMMU guest driver: tells the host which guest frames devices may touch, so
 * that it pins only those. docs/abi.md is the contract with the host.
 */
#include <linux/module.h>

#include "coiommu.h"

static int __init coiommu_init(void)
{
	int ret;

	ret = coiommu_hooks_init();
	if (ret)
		return ret;
	ret = coiommu_viommu_register();
	if (ret) {
		coiommu_hooks_exit();
		return ret;
	}
	coiommu_debugfs_init();
	return 0;
}

/* Nothing is hooked: each hook holds a reference to the module. */
static void __exit coiommu_exit(void)
{
	coiommu_viommu_unregister();
	coiommu_hooks_exit();
	coiommu_debugfs_exit();
	coiommu_dtt_destroy();
}

module_init(coiommu_init);
module_exit(coiommu_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("coIOMMU: cooperative tracking of DMA buffers");

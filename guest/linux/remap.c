// SPDX-License-Identifier: GPL-2.0
/*
 * Which functions are to be remapped: the parameter "remap" when the module is
 * loaded, and /sys/kernel/debug/coiommu/remap at run time, which takes lines like
 * "0000:00:04.0 on".
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/debugfs.h>
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include "coiommu.h"

static char *remap;
module_param(remap, charp, 0444);
MODULE_PARM_DESC(remap, "Functions to remap instead of tracking them: BDF[,BDF...] or all");

static int parse_bdf(const char *text, u16 *bdf)
{
	unsigned int segment = 0, bus, slot, func;
	int end = 0;

	if (sscanf(text, "%x:%x:%x.%u%n", &segment, &bus, &slot, &func, &end) != 4 || text[end]) {
		segment = 0;
		if (sscanf(text, "%x:%x.%u%n", &bus, &slot, &func, &end) != 3 || text[end])
			return -EINVAL;
	}
	if (segment || bus > 0xff || slot > 0x1f || func > 7)
		return -EINVAL;
	*bdf = PCI_DEVID(bus, PCI_DEVFN(slot, func));
	return 0;
}

/* Caller: nothing is hooked yet. */
int coiommu_remap_init(void)
{
	char *list, *rest, *word;
	int ret = 0;

	if (!remap)
		return 0;
	if (!strcmp(remap, "all"))
		return coiommu_hooks_want_remapped(0, U16_MAX, true);
	list = rest = kstrdup(remap, GFP_KERNEL);
	if (!list)
		return -ENOMEM;
	while (!ret && (word = strsep(&rest, ","))) {
		u16 bdf;

		ret = parse_bdf(word, &bdf) ?: coiommu_hooks_want_remapped(bdf, bdf, true);
		if (ret)
			pr_err("remap: \"%s\" is no function, such as 0000:00:04.0\n", word);
	}
	kfree(list);
	return ret;
}

static int change(char *line)
{
	char *text = strim(line);
	char *word = strsep(&text, " ");
	bool on;
	u16 bdf;
	int ret;

	if (!text)
		return -EINVAL;
	ret = parse_bdf(word, &bdf) ?: kstrtobool(skip_spaces(text), &on);
	return ret ?: coiommu_hooks_want_remapped(bdf, bdf, on);
}

static ssize_t remap_write(struct file *file, const char __user *from, size_t size, loff_t *pos)
{
	char line[64];
	int ret;

	if (size >= sizeof(line))
		return -EINVAL;
	if (copy_from_user(line, from, size))
		return -EFAULT;
	line[size] = 0;
	ret = change(line);
	return ret ?: size;
}

static int remap_show(struct seq_file *file, void *unused)
{
	coiommu_hooks_show_remapped(file);
	return 0;
}

static int remap_open(struct inode *inode, struct file *file)
{
	return single_open(file, remap_show, NULL);
}

const struct file_operations coiommu_remap_fops = {
	.owner		= THIS_MODULE,
	.open		= remap_open,
	.read		= seq_read,
	.write		= remap_write,
	.llseek		= seq_lseek,
	.release	= single_release,
};

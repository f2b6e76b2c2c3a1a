/*
 * Appended to the module: a driver that claims pages for the assigned disk's
 * DMA, through the kernel's own API, and gives none of them to the disk. It
 * leaves HOARD_IDLE behind that are pinned and not mapped any more.
 */
#include <linux/dma-mapping.h>
#include <linux/gfp.h>
#include <linux/moduleparam.h>
#include <linux/pci.h>

static unsigned long hoarded, hoard_refused;

static int hoard_set(const char *value, const struct kernel_param *kp)
{
	unsigned long wanted, i;
	struct pci_dev *disk;
	int ret;

	ret = kstrtoul(value, 0, &wanted);
	if (ret)
		return ret;
	disk = pci_get_domain_bus_and_slot(0, 0, PCI_DEVFN(4, 0));
	if (!disk)
		return -ENODEV;
	for (i = 0; i < wanted + HOARD_IDLE; i++) {
		struct page *page = alloc_page(GFP_KERNEL);
		dma_addr_t address;

		if (!page) {
			ret = -ENOMEM;
			break;
		}
		address = dma_map_page(&disk->dev, page, 0, PAGE_SIZE, DMA_BIDIRECTIONAL);
		if (dma_mapping_error(&disk->dev, address))
			hoard_refused++;
		else if (i < HOARD_IDLE)
			dma_unmap_page(&disk->dev, address, PAGE_SIZE, DMA_BIDIRECTIONAL);
		else
			hoarded++;
	}
	pci_dev_put(disk);
	return ret;
}

static const struct kernel_param_ops hoard_ops = { .set = hoard_set };
module_param_cb(hoard, &hoard_ops, NULL, 0200);
module_param(hoarded, ulong, 0444);
module_param(hoard_refused, ulong, 0444);

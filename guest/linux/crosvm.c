// SPDX-License-Identifier: GPL-2.0
/*
 * The crosvm-compatible PCI function: abi.md section 5. It can only pin: it says
 * no reason when it refuses, it has no domains, and no way to be told COMPLETE.
 */
#include <linux/bits.h>
#include <linux/gfp.h>
#include <linux/io.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/pm.h>
#include <linux/smp.h>
#include <linux/spinlock.h>
#include <linux/string.h>

#include "coiommu.h"

#define SLOTS		(COIOMMU_BAR_SIZE / COIOMMU_SLOT_SIZE)
#define BARS		(BIT(COIOMMU_MMIO_BAR) | BIT(COIOMMU_NOTIFYMAP_BAR) | \
			 BIT(COIOMMU_TOPOLOGYMAP_BAR))
/* A list of frames fills a page. */
#define LIST_FRAMES	((PAGE_SIZE - sizeof(struct pin_pages_info)) / COIOMMU_PFN_SIZE)

static struct {
	void __iomem *registers;
	void __iomem *slots;
	void __iomem *topology;
	/* All below: with PIN on, the lock of requests.c protects it. */
	struct pin_pages_info *list;	/* the device's while a request is out */
	unsigned int slot;		/* of the request that is out */
	struct virtio_iommu_req_tail *tail;
} crosvm;

/*
 * One access at a time, of all CPUs: QEMU 7.2 drops an access to an
 * x-pci-proxy-dev while another CPU has one under way ("Blocked re-entrant IO").
 * Of a slot that is read, the 0 that comes then would mean that it is done.
 */
static DEFINE_SPINLOCK(access);

static u64 read_64(void __iomem *at)
{
	unsigned long flags;
	u64 value;

	spin_lock_irqsave(&access, flags);
	value = readq(at);
	spin_unlock_irqrestore(&access, flags);
	return value;
}

static void write_64(void __iomem *at, u64 value)
{
	unsigned long flags;

	spin_lock_irqsave(&access, flags);
	writeq(value, at);
	spin_unlock_irqrestore(&access, flags);
}

static u16 read_topology(unsigned int index)
{
	unsigned long flags;
	u16 value;

	spin_lock_irqsave(&access, flags);
	value = readw(crosvm.topology + index * sizeof(u16));
	spin_unlock_irqrestore(&access, flags);
	return value;
}

static void trigger(void)
{
	unsigned long flags;

	coiommu_count(kicks);
	spin_lock_irqsave(&access, flags);
	writeb(1, crosvm.registers + COIOMMU_TRIGGERS + crosvm.slot);
	spin_unlock_irqrestore(&access, flags);
}

static void __iomem *slot(void)
{
	return crosvm.slots + crosvm.slot * COIOMMU_SLOT_SIZE;
}

/* In the words of virtio-iommu, which pin.c speaks; it asks for no more frames than a list has. */
static int send_request(const void *data, size_t size, void *reply, size_t reply_size)
{
	const struct virtio_iommu_req_pin *request = data;
	__le64 *frames = (__le64 *)(crosvm.list + 1);
	u32 i, j, nr = 0;
	u16 bdf;

	if (request->head.type != VIRTIO_IOMMU_T_PIN)
		return -EOPNOTSUPP;
	for (i = 0; i < le32_to_cpu(request->nr_ranges); i++)
		for (j = 0; j < le32_to_cpu(request->ranges[i].nr_frames); j++)
			frames[nr++] = cpu_to_le64(le64_to_cpu(request->ranges[i].gfn) + j);
	bdf = le32_to_cpu(request->endpoint);
	crosvm.list->bdf = cpu_to_le16(bdf);
	crosvm.list->nr_pages = cpu_to_le64(nr);
	crosvm.tail = reply;
	crosvm.slot = smp_processor_id() % SLOTS;
	/* ORDERING: writeq() comes after the stores to the list. */
	write_64(slot(), nr == 1 ? le64_to_cpu(frames[0]) << 16 | bdf :
		 COIOMMU_PIN_PAGES_IN_BATCH | virt_to_phys(crosvm.list));
	trigger();
	return 0;
}

/*
 * Whether it was done, P alone says.
 * ORDERING: what is read after readq() is; see struct coiommu_channel.
 */
static int answered(void)
{
	if (read_64(slot()))
		return -EAGAIN;
	crosvm.tail->status = VIRTIO_IOMMU_S_OK;
	return sizeof(*crosvm.tail);
}

static int await_answer(void)
{
	return coiommu_await(answered, trigger);
}

static bool request_returned(void)
{
	return answered() >= 0;
}

static const struct coiommu_channel channel = {
	.send		= send_request,
	.await		= await_answer,
	.returned	= request_returned,
};

/* The read comes back when the command has been done. */
static u64 command(u64 value)
{
	write_64(crosvm.registers + COIOMMU_REG_COMMAND, value);
	return read_64(crosvm.registers + COIOMMU_REG_COMMAND);
}

/* Again if a function came or went meanwhile. */
static void read_assigned(u8 *assigned)
{
	u16 count;

	do {
		unsigned int i, nr;

		count = read_topology(0);
		nr = min_t(unsigned int, count, COIOMMU_BAR_SIZE / sizeof(u16) - 1);
		memset(assigned, 0, VIRTIO_IOMMU_ASSIGNED_BITMAP_SIZE);
		for (i = 1; i <= nr; i++) {
			u16 bdf = read_topology(i);

			assigned[bdf / 8] |= BIT(bdf % 8);
		}
	} while (read_topology(0) != count);
}

/* It does not say whether it has taken the table; if not, nothing can be mapped. */
static int turn_on(void)
{
	coiommu_dtt_mark_writable(false);	/* D is not looked at */
	write_64(crosvm.registers + COIOMMU_REG_DTT_ROOT, coiommu_dtt_root());
	write_64(crosvm.registers + COIOMMU_REG_DTT_LEVEL, coiommu_dtt_levels());
	return command(COIOMMU_CMD_ACTIVATE) == COIOMMU_CMD_ACTIVATE ? 0 : -EIO;
}

static const struct coiommu_limits no_domains;

static const struct coiommu_device_ops crosvm_ops = {
	.read_assigned	= read_assigned,
	.turn_on	= turn_on,
	.limits		= &no_domains,
};

static int start(struct pci_dev *pdev)
{
	int ret;

	ret = pcim_enable_device(pdev) ?: pcim_iomap_regions(pdev, BARS, KBUILD_MODNAME);
	if (ret)
		return ret;
	if (pci_resource_len(pdev, COIOMMU_MMIO_BAR) < COIOMMU_BAR_SIZE ||
	    pci_resource_len(pdev, COIOMMU_NOTIFYMAP_BAR) < COIOMMU_BAR_SIZE ||
	    pci_resource_len(pdev, COIOMMU_TOPOLOGYMAP_BAR) < COIOMMU_BAR_SIZE) {
		dev_err(&pdev->dev, "its BARs are too small\n");
		return -ENODEV;
	}
	crosvm.list = (void *)get_zeroed_page(GFP_KERNEL);
	if (!crosvm.list)
		return -ENOMEM;
	crosvm.slots = pcim_iomap_table(pdev)[COIOMMU_NOTIFYMAP_BAR];
	crosvm.topology = pcim_iomap_table(pdev)[COIOMMU_TOPOLOGYMAP_BAR];
	crosvm.registers = pcim_iomap_table(pdev)[COIOMMU_MMIO_BAR];
	coiommu_pin_limit(U32_MAX, LIST_FRAMES);
	return coiommu_requests_open(&channel) ?:
		coiommu_device_activate(&crosvm_ops, &pdev->dev, &pdev->dev);
}

/* Also undoes a start() that failed half way. */
static void stop(void)
{
	coiommu_requests_disable();
	if (crosvm.registers) {
		command(COIOMMU_CMD_DEACTIVATE);
		coiommu_requests_close();
		coiommu_dtt_forget_pins();
	}
	crosvm.registers = NULL;
	free_page((unsigned long)crosvm.list);
	crosvm.list = NULL;
}

static int crosvm_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	int ret = coiommu_device_claim(&pdev->dev);

	if (ret)
		return ret;
	ret = start(pdev);
	if (ret) {
		stop();
		coiommu_device_release(&pdev->dev);
		return ret;
	}
	dev_info(&pdev->dev, "pinning is on, %u table levels\n", coiommu_dtt_levels());
	coiommu_hooks_end(true);
	return 0;
}

/* With functions still hooked this fails closed, as viommu_remove() does. */
static void crosvm_remove(struct pci_dev *pdev)
{
	coiommu_hooks_stop();
	stop();
	coiommu_device_release(&pdev->dev);
}

/* See viommu_freeze(). */
static int crosvm_suspend(struct device *dev)
{
	dev_err(dev, "a guest with pinned DMA buffers cannot be suspended\n");
	return -EOPNOTSUPP;
}

static DEFINE_SIMPLE_DEV_PM_OPS(crosvm_pm_ops, crosvm_suspend, NULL);

/* No alias of the module: whoever wants this function driven says so. */
static const struct pci_device_id ids[] = {
	{ PCI_DEVICE(PCI_VENDOR_ID_COIOMMU, PCI_DEVICE_ID_COIOMMU) },
	{ 0 }
};

static struct pci_driver crosvm_driver = {
	.name		= KBUILD_MODNAME,
	.id_table	= ids,
	.probe		= crosvm_probe,
	.remove		= crosvm_remove,
	.driver.pm	= pm_sleep_ptr(&crosvm_pm_ops),
};

int coiommu_crosvm_register(void)
{
	return pci_register_driver(&crosvm_driver);
}

void coiommu_crosvm_unregister(void)
{
	pci_unregister_driver(&crosvm_driver);
}

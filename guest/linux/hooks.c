// SPDX-License-Identifier: GPL-2.0
/*
 * Which PCI functions are hooked, and when.
 *
 * A function is hooked after its bus has configured DMA and before its driver
 * probes (BUS_NOTIFY_BIND_DRIVER), and never while it has live mappings. The
 * host is told COMPLETE (abi.md section 3, pin_flags), so no assigned function
 * may get past us while PIN is being turned on:
 *
 *	coiommu_hooks_begin():	from now on who binds is hooked, and waits;
 *				who was bound is released from its driver
 *	PIN on
 *	coiommu_hooks_end():	who waits goes on; who was released binds again
 */
#include <linux/bitmap.h>
#include <linux/device.h>
#include <linux/delay.h>
#include <linux/jiffies.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/wait.h>

#include "coiommu.h"

/* For a driver's probe that runs while we want the function: some wait for their hardware. */
#define PROBE_WAIT_S	30
/* For our own probe, which may wait so for a function. */
#define BEGIN_WAIT_S	(2 * PROBE_WAIT_S)

enum coiommu_phase {
	PHASE_OFF,		/* functions bind as if we were not there */
	PHASE_BEGIN,		/* between coiommu_hooks_begin() and _end() */
	PHASE_ON,
};

struct released {
	struct list_head node;
	struct pci_dev *pdev;
};

/* Protects all below. Never held while a driver probes or is released. */
static DEFINE_MUTEX(hooks_lock);
static DECLARE_WAIT_QUEUE_HEAD(phase_changed);
static enum coiommu_phase phase;
static LIST_HEAD(hooks);
static const u8 *assigned;		/* bit BDF of segment 0 */
static DECLARE_BITMAP(to_remap, 1 + U16_MAX);	/* alike */
static struct device *self;		/* the function of the virtio-iommu */
static struct device *releasing;	/* coiommu_hooks_begin() waits for its device lock */
static LIST_HEAD(released);		/* of coiommu_hooks_begin() and _end() alone */

static bool is_assigned(struct device *dev)
{
	struct pci_dev *pdev = to_pci_dev(dev);
	u16 bdf = pci_dev_id(pdev);

	return dev != self && pci_domain_nr(pdev->bus) == 0 &&
	       (assigned[bdf / 8] & BIT(bdf % 8));
}

static struct coiommu_hook *find_hook(struct device *dev)
{
	struct coiommu_hook *hook;

	lockdep_assert_held(&hooks_lock);
	list_for_each_entry(hook, &hooks, node)
		if (hook->dev == dev)
			return hook;
	return NULL;
}

static void free_hook(struct device *shadow)
{
	kfree(container_of(shadow, struct coiommu_hook, shadow));
}

static struct coiommu_hook *make_hook(struct device *dev)
{
	/*
	 * A driver cannot be kept from binding here, and must not bind without
	 * a hook: better wait for memory than lose track of a function.
	 */
	struct coiommu_hook *hook = kzalloc(sizeof(*hook), GFP_KERNEL | __GFP_NOFAIL);
	struct pci_dev *pdev = to_pci_dev(dev);

	hook->ops = coiommu_dma_ops;
	hook->dev = dev;
	hook->endpoint = pci_domain_nr(pdev->bus) << 16 | pci_dev_id(pdev);
	device_initialize(&hook->shadow);
	hook->shadow.release = free_hook;
	dev_set_name(&hook->shadow, "%s (coiommu)", dev_name(dev));
	list_add(&hook->node, &hooks);
	return hook;
}

/* The bus may have configured DMA anew since the last driver. */
static void configure_shadow(struct device *shadow, struct device *dev)
{
	shadow->dma_mask = dev->dma_mask;	/* a pointer, so always current */
	shadow->coherent_dma_mask = dev->coherent_dma_mask;
	shadow->bus_dma_limit = dev->bus_dma_limit;
	shadow->dma_range_map = dev->dma_range_map;
	shadow->dma_parms = dev->dma_parms;
#ifdef CONFIG_SWIOTLB
	shadow->dma_io_tlb_mem = dev->dma_io_tlb_mem;
#endif
	set_dev_node(shadow, dev_to_node(dev));
}

/* Caller: no driver is bound, so nothing is mapped. */
static void stop_remapping(struct coiommu_hook *hook)
{
	if (!hook->remapped)
		return;
	if (hook->domain)
		coiommu_domain_destroy(hook->domain);
	hook->domain = NULL;
	hook->remapped = false;
	hook->ops = coiommu_dma_ops;
}

/* Caller: PIN is on, and no driver uses the function yet. */
static void start_remapping(struct coiommu_hook *hook)
{
	hook->domain = coiommu_domain_create(hook->dev, hook->endpoint,
					     coiommu_device_limits());
	hook->remapped = true;
	hook->ops = coiommu_remap_ops;
}

static bool hook_device(struct device *dev)
{
	struct coiommu_hook *hook = find_hook(dev);

	if (hook) {
		stop_remapping(hook);	/* left by a failed probe */
	} else {
		if (get_dma_ops(dev)) {
			dev_err(dev, "coiommu: DMA is translated by something else: not tracked\n");
			return false;
		}
		/* One per hook: the module cannot go while a driver depends on it. */
		if (!try_module_get(THIS_MODULE)) {
			dev_err(dev, "coiommu: bound while the module unloads: not tracked\n");
			return false;
		}
		hook = make_hook(dev);
	}
	configure_shadow(&hook->shadow, dev);
	set_dma_ops(dev, &hook->ops);
	return true;
}

static void unhook_device(struct device *dev)
{
	struct coiommu_hook *hook = find_hook(dev);

	if (!hook)
		return;
	stop_remapping(hook);
	if (dev->dma_ops == &hook->ops)
		set_dma_ops(dev, NULL);
	list_del(&hook->node);
	hook->shadow.dma_range_map = NULL;	/* not ours; device_release() would free it */
	put_device(&hook->shadow);
	module_put(THIS_MODULE);
	dev_info(dev, "coiommu: no longer tracked\n");
}

/* Called with the device lock of @dev held, as in every driver's probe. */
static void driver_binds(struct device *dev)
{
	mutex_lock(&hooks_lock);
	if (phase == PHASE_OFF) {
		unhook_device(dev);	/* left by a failed probe */
		goto out;
	}
	/* It may have been plugged since we asked, or be in the place of one that was. */
	if (phase == PHASE_ON && dev != self)
		coiommu_device_read_assigned();
	if (!is_assigned(dev) || !hook_device(dev))
		goto out;

	/*
	 * Before PIN is on, mappings fail: wait, with the hook as a sign that
	 * this function needs no releasing. But do not wait if
	 * coiommu_hooks_begin() is waiting for our device lock: it saw another
	 * driver bound, which has since been replaced. Let this probe run into
	 * failing mappings; the function is released and bound again anyway.
	 *
	 * The wait is bounded because it is under the notifier chain's rwsem: a
	 * writer queued there would block the release of the other functions.
	 * Then, too, mappings fail, and nothing is lost but this probe.
	 */
	mutex_unlock(&hooks_lock);
	wait_event_timeout(phase_changed,
			   READ_ONCE(phase) != PHASE_BEGIN || READ_ONCE(releasing) == dev,
			   BEGIN_WAIT_S * HZ);
	mutex_lock(&hooks_lock);
	if (phase == PHASE_OFF)
		unhook_device(dev);
	else if (test_bit(pci_dev_id(to_pci_dev(dev)), to_remap))
		start_remapping(find_hook(dev));
	else if (!coiommu_let_fault(find_hook(dev)))
		dev_info(dev, "coiommu: DMA is tracked\n");
out:
	mutex_unlock(&hooks_lock);
}

/*
 * Unhook at UNBOUND_DRIVER, not at DRIVER_NOT_BOUND (a probe failed): memory
 * managed by devres is freed between that and here. So after a failed probe the
 * hook stays, until the function gets another driver and loses it, or is removed.
 */
static int pci_changes(struct notifier_block *nb, unsigned long action, void *data)
{
	struct device *dev = data;

	switch (action) {
	case BUS_NOTIFY_BIND_DRIVER:
		driver_binds(dev);
		break;
	case BUS_NOTIFY_UNBOUND_DRIVER:
	case BUS_NOTIFY_REMOVED_DEVICE:
		mutex_lock(&hooks_lock);
		unhook_device(dev);
		mutex_unlock(&hooks_lock);
		break;
	}
	return NOTIFY_DONE;
}

static struct notifier_block pci_nb = { .notifier_call = pci_changes };

static void set_releasing(struct device *dev)
{
	mutex_lock(&hooks_lock);
	WRITE_ONCE(releasing, dev);
	mutex_unlock(&hooks_lock);
	wake_up_all(&phase_changed);
}

/*
 * Unless it is remapped since an earlier device: its domain has gone with that,
 * and with the domain all that is mapped.
 */
static bool is_hooked(struct device *dev)
{
	struct coiommu_hook *hook;
	bool hooked;

	mutex_lock(&hooks_lock);
	hook = find_hook(dev);
	hooked = hook && !hook->remapped;
	mutex_unlock(&hooks_lock);
	return hooked;
}

/*
 * Take the device lock of @dev, unless @dev is hooked and so in driver_binds(),
 * waiting with that lock held: hence no plain device_lock(). Who holds the lock
 * otherwise will either come there or finish its probe.
 * Returns 1 locked, 0 hooked.
 */
static int lock_unless_hooked(struct device *dev)
{
	unsigned long deadline = jiffies + PROBE_WAIT_S * HZ;

	while (!is_hooked(dev)) {
		if (device_trylock(dev))
			return 1;
		if (time_after(jiffies, deadline)) {
			dev_err(dev, "coiommu: busy for %d s: cannot be tracked\n", PROBE_WAIT_S);
			return -EBUSY;
		}
		msleep(1);
	}
	return 0;
}

static int release_unless_hooked(struct pci_dev *pdev)
{
	struct device *dev = &pdev->dev;
	struct released *entry;
	bool bound;
	int ret;

	ret = lock_unless_hooked(dev);
	if (ret <= 0)
		return ret;
	bound = dev->driver;
	device_unlock(dev);
	if (!bound)
		return 0;	/* whoever binds now comes to driver_binds() */

	entry = kmalloc(sizeof(*entry), GFP_KERNEL);
	if (!entry)
		return -ENOMEM;
	entry->pdev = pci_dev_get(pdev);
	list_add_tail(&entry->node, &released);

	dev_info(dev, "coiommu: binding its driver again, so that its DMA is tracked\n");
	set_releasing(dev);
	device_release_driver(dev);
	set_releasing(NULL);
	return 0;
}

/**
 * coiommu_hooks_begin - see to it that no assigned function has an uncounted mapping
 * @bitmap: the assigned functions; lives until the phase is off again
 * @own: the device that the virtio-iommu sits on: never touched
 *
 * Functions that are tracked since an earlier device stay as they are: their
 * mappings are in the table. Whether this fails or not, coiommu_hooks_end() must
 * follow.
 */
int coiommu_hooks_begin(const u8 *bitmap, struct device *own)
{
	struct pci_dev *pdev = NULL;
	int ret = 0;

	mutex_lock(&hooks_lock);
	assigned = bitmap;
	self = own;
	WRITE_ONCE(phase, PHASE_BEGIN);
	mutex_unlock(&hooks_lock);

	for_each_pci_dev(pdev) {
		if (!is_assigned(&pdev->dev))
			continue;
		ret = release_unless_hooked(pdev);
		if (ret) {
			pci_dev_put(pdev);
			break;
		}
	}
	return ret;
}

/* @on: PIN is on. Otherwise everything binds as if we were not there. */
void coiommu_hooks_end(bool on)
{
	struct released *entry, *next;

	mutex_lock(&hooks_lock);
	WRITE_ONCE(phase, on ? PHASE_ON : PHASE_OFF);
	mutex_unlock(&hooks_lock);
	wake_up_all(&phase_changed);

	list_for_each_entry_safe(entry, next, &released, node) {
		struct device *dev = &entry->pdev->dev;

		if (device_attach(dev) <= 0)
			dev_warn(dev, "coiommu: no driver took it back\n");
		list_del(&entry->node);
		pci_dev_put(entry->pdev);
		kfree(entry);
	}
}

/* No new hooks. Returns how many are left. */
unsigned int coiommu_hooks_stop(void)
{
	mutex_lock(&hooks_lock);
	WRITE_ONCE(phase, PHASE_OFF);
	mutex_unlock(&hooks_lock);
	wake_up_all(&phase_changed);
	return coiommu_hooks_count();
}

unsigned int coiommu_hooks_count(void)
{
	struct coiommu_hook *hook;
	unsigned int count = 0;

	mutex_lock(&hooks_lock);
	list_for_each_entry(hook, &hooks, node)
		count++;
	mutex_unlock(&hooks_lock);
	return count;
}

/* The endpoint of some hooked function, if there is one. */
bool coiommu_hooks_any(u32 *endpoint)
{
	struct coiommu_hook *hook;

	mutex_lock(&hooks_lock);
	hook = list_first_entry_or_null(&hooks, struct coiommu_hook, node);
	if (hook)
		*endpoint = hook->endpoint;
	mutex_unlock(&hooks_lock);
	return hook;
}

bool coiommu_hooks_any_remapped(void)
{
	struct coiommu_hook *hook;
	bool any = false;

	mutex_lock(&hooks_lock);
	list_for_each_entry(hook, &hooks, node)
		any |= hook->remapped;
	mutex_unlock(&hooks_lock);
	return any;
}

/*
 * Whether the functions from @first to @last are remapped, or tracked, from their
 * next driver on. Not while one is bound: what it has mapped would have to be
 * mapped anew, at other addresses.
 */
int coiommu_hooks_want_remapped(u32 first, u32 last, bool on)
{
	struct coiommu_hook *hook;
	int ret = 0;

	mutex_lock(&hooks_lock);
	list_for_each_entry(hook, &hooks, node)
		if (hook->endpoint >= first && hook->endpoint <= last && hook->dev->driver) {
			dev_err(hook->dev, "coiommu: unbind its driver first\n");
			ret = -EBUSY;
		}
	if (!ret && on)
		bitmap_set(to_remap, first, last - first + 1);
	else if (!ret)
		bitmap_clear(to_remap, first, last - first + 1);
	mutex_unlock(&hooks_lock);
	return ret;
}

/* What is hooked: "tracked", "remapped", or "blocked", when it should be but is in no domain. */
void coiommu_hooks_show_remapped(struct seq_file *file)
{
	struct coiommu_hook *hook;

	mutex_lock(&hooks_lock);
	list_for_each_entry(hook, &hooks, node)
		seq_printf(file, "%s %s\n", dev_name(hook->dev),
			   !hook->remapped ? "tracked" : hook->domain ? "remapped" : "blocked");
	mutex_unlock(&hooks_lock);
}

int coiommu_hooks_init(void)
{
	return bus_register_notifier(&pci_bus_type, &pci_nb);
}

/* Caller: the virtio driver is gone, and the module reference of each hook too. */
void coiommu_hooks_exit(void)
{
	bus_unregister_notifier(&pci_bus_type, &pci_nb);
}

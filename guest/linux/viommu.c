// SPDX-License-Identifier: GPL-2.0
/*
 * The virtio-iommu device with PIN_PAGE: configuration, control, PIN requests.
 * abi.md section 3.
 *
 * Requests are made by mappings, so in atomic context: one at a time, under a
 * spinlock with interrupts off, and the answer is polled for.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cache.h>
#include <linux/cc_platform.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/ratelimit.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>

#include "coiommu.h"

/* A host that takes longer is taken for dead: the CPU spins all that time. */
#define PIN_WAIT_MS		5000
/* How many polls between two looks at the clock, which may be slow to read. */
#define POLLS_PER_CLOCK		256

/* No status of the standard: what the tail says until the device has answered. */
#define STATUS_UNANSWERED	0xff

/* One page, shared with the device while a request is out. */
struct pin_buffer {
	struct virtio_iommu_req_tail tail;
	struct virtio_iommu_req_pin request ____cacheline_aligned;
};

#define BUFFER_RANGES	((PAGE_SIZE - sizeof(struct pin_buffer)) / \
			 sizeof(struct virtio_iommu_pin_range))

static struct {
	atomic_t claimed;	/* one device at a time: there is one table */
	struct virtio_device *vdev;
	u8 *assigned;		/* filled by the device */

	spinlock_t lock;	/* protects what follows, and the virtqueue */
	bool ready;		/* PIN is on, and requests are being answered */
	struct virtqueue *vq;
	struct pin_buffer *buffer;
	u32 nr_ranges;		/* of the request being built */
	u32 nr_ranges_max;
	u32 nr_frames;
} viommu = {
	.lock = __SPIN_LOCK_UNLOCKED(viommu.lock),
};

static const char * const status_names[] = {
	[VIRTIO_IOMMU_S_OK]	= "OK",
	[VIRTIO_IOMMU_S_IOERR]	= "IOERR",
	[VIRTIO_IOMMU_S_UNSUPP]	= "UNSUPP",
	[VIRTIO_IOMMU_S_DEVERR]	= "DEVERR",
	[VIRTIO_IOMMU_S_INVAL]	= "INVAL",
	[VIRTIO_IOMMU_S_RANGE]	= "RANGE",
	[VIRTIO_IOMMU_S_NOENT]	= "NOENT",
	[VIRTIO_IOMMU_S_FAULT]	= "FAULT",
	[VIRTIO_IOMMU_S_NOMEM]	= "NOMEM",
};

static const char *status_name(u8 status)
{
	return status < ARRAY_SIZE(status_names) ? status_names[status] : "unknown status";
}

static int status_to_errno(u8 status)
{
	switch (status) {
	case VIRTIO_IOMMU_S_OK:
		return 0;
	case VIRTIO_IOMMU_S_UNSUPP:
		return -ENOSYS;
	case VIRTIO_IOMMU_S_INVAL:
		return -EINVAL;
	case VIRTIO_IOMMU_S_RANGE:
		return -ERANGE;
	case VIRTIO_IOMMU_S_NOENT:
		return -ENOENT;
	case VIRTIO_IOMMU_S_FAULT:
		return -EFAULT;
	case VIRTIO_IOMMU_S_NOMEM:
		return -ENOMEM;
	case VIRTIO_IOMMU_S_IOERR:
	case VIRTIO_IOMMU_S_DEVERR:
	default:
		return -EIO;
	}
}

static void count_status(u8 status)
{
	switch (status) {
	case VIRTIO_IOMMU_S_OK:
		break;
	case VIRTIO_IOMMU_S_IOERR:
		coiommu_count(pin_status_ioerr);
		break;
	case VIRTIO_IOMMU_S_UNSUPP:
		coiommu_count(pin_status_unsupp);
		break;
	case VIRTIO_IOMMU_S_DEVERR:
		coiommu_count(pin_status_deverr);
		break;
	case VIRTIO_IOMMU_S_INVAL:
		coiommu_count(pin_status_inval);
		break;
	case VIRTIO_IOMMU_S_RANGE:
		coiommu_count(pin_status_range);
		break;
	case VIRTIO_IOMMU_S_NOENT:
		coiommu_count(pin_status_noent);
		break;
	case VIRTIO_IOMMU_S_FAULT:
		coiommu_count(pin_status_fault);
		break;
	case VIRTIO_IOMMU_S_NOMEM:
		coiommu_count(pin_status_nomem);
		break;
	default:
		coiommu_count(pin_status_unknown);
	}
}

/* Length that the device wrote, or -ETIMEDOUT. */
static int await_answer(void)
{
	unsigned int len, polls = 0;
	ktime_t deadline = 0;

	while (!virtqueue_get_buf(viommu.vq, &len)) {
		if (polls++ % POLLS_PER_CLOCK == 0) {
			ktime_t now = ktime_get();

			if (!deadline)
				deadline = ktime_add_ms(now, PIN_WAIT_MS);
			if (ktime_after(now, deadline) || virtqueue_is_broken(viommu.vq))
				return -ETIMEDOUT;
		}
		cpu_relax();
	}
	return len;
}

/* Send the request in the buffer and wait: the status of abi.md section 3, or an errno. */
static int exchange(u32 endpoint)
{
	struct virtio_iommu_req_pin *request = &viommu.buffer->request;
	struct virtio_iommu_req_tail *tail = &viommu.buffer->tail;
	struct scatterlist out, in, *sgs[] = { &out, &in };
	int ret;

	lockdep_assert_held(&viommu.lock);

	request->head = (struct virtio_iommu_req_head){ .type = VIRTIO_IOMMU_T_PIN };
	request->endpoint = cpu_to_le32(endpoint);
	request->flags = 0;
	request->nr_ranges = cpu_to_le32(viommu.nr_ranges);
	*tail = (struct virtio_iommu_req_tail){ .status = STATUS_UNANSWERED };

	sg_init_one(&out, request, struct_size(request, ranges, viommu.nr_ranges));
	sg_init_one(&in, tail, sizeof(*tail));
	ret = virtqueue_add_sgs(viommu.vq, sgs, 1, 1, viommu.buffer, GFP_ATOMIC);
	if (ret)
		return ret;
	coiommu_count(pin_requests);
	virtqueue_kick(viommu.vq);

	ret = await_answer();
	if (ret < 0) {
		/* The buffer may still be the device's: it is not touched again before a reset. */
		viommu.ready = false;
		coiommu_count(pin_lost);
		return ret;
	}
	/* VIRTIO 1.2: a device that does not know a request writes nothing. */
	return ret < sizeof(*tail) ? VIRTIO_IOMMU_S_UNSUPP : tail->status;
}

/*
 * The host says that it has set P in every frame of the request; each mapping
 * must see it before its device may have the address. abi.md section 2.
 */
static bool all_pinned(void)
{
	const struct virtio_iommu_pin_range *range = viommu.buffer->request.ranges;
	u32 i, j;

	for (i = 0; i < viommu.nr_ranges; i++, range++)
		for (j = 0; j < le32_to_cpu(range->nr_frames); j++)
			if (!coiommu_dtt_pinned(le64_to_cpu(range->gfn) + j))
				return false;
	return true;
}

static void flush(struct coiommu_pin *pin)
{
	int ret;

	if (!viommu.nr_ranges || pin->error)
		return;

	pin->nr_frames = viommu.nr_frames;
	ret = exchange(pin->endpoint);
	if (ret < 0) {
		pin->error = ret;
	} else if (ret != VIRTIO_IOMMU_S_OK) {
		count_status(ret);
		pin->status = ret;
		pin->error = status_to_errno(ret);
	} else if (!all_pinned()) {
		coiommu_count(pin_not_seen);
		pin->error = -EPROTO;
	} else {
		coiommu_add(pin_frames, viommu.nr_frames);
	}
	viommu.nr_ranges = 0;
	viommu.nr_frames = 0;
}

/* Start the pin requests of one mapping. Its frames have been counted up. */
void coiommu_pin_begin(struct coiommu_pin *pin, u32 endpoint) __acquires(&viommu.lock)
{
	unsigned long flags;

	*pin = (struct coiommu_pin){ .endpoint = endpoint };
	spin_lock_irqsave(&viommu.lock, flags);
	pin->flags = flags;
	viommu.nr_ranges = 0;
	viommu.nr_frames = 0;
}

static void add_frame(struct coiommu_pin *pin, u64 gfn)
{
	struct virtio_iommu_pin_range *range;

	if (viommu.nr_ranges) {
		u64 start, end;

		range = &viommu.buffer->request.ranges[viommu.nr_ranges - 1];
		start = le64_to_cpu(range->gfn);
		end = start + le32_to_cpu(range->nr_frames);
		if (gfn >= start && gfn < end)
			return;		/* neighbours in a list may share a frame */
		if (gfn == end) {
			le32_add_cpu(&range->nr_frames, 1);
			viommu.nr_frames++;
			return;
		}
	}
	if (viommu.nr_ranges == viommu.nr_ranges_max) {
		flush(pin);
		if (pin->error)
			return;
	}
	range = &viommu.buffer->request.ranges[viommu.nr_ranges++];
	*range = (struct virtio_iommu_pin_range){
		.gfn = cpu_to_le64(gfn),
		.nr_frames = cpu_to_le32(1),
	};
	viommu.nr_frames++;
}

/* Ask for those of @nr frames that are not pinned. */
void coiommu_pin_add(struct coiommu_pin *pin, u64 gfn, u64 nr)
{
	lockdep_assert_held(&viommu.lock);

	/* Without a device there is no buffer to fill. */
	if (!pin->error && !viommu.ready) {
		coiommu_count(pin_off);
		pin->nr_frames = nr;
		pin->error = -ENODEV;
	}
	for (; nr && !pin->error; gfn++, nr--)
		if (!coiommu_dtt_pinned(gfn))
			add_frame(pin, gfn);
}

static void report(const struct coiommu_pin *pin)
{
	u8 bus = PCI_BUS_NUM(pin->endpoint), devfn = pin->endpoint & 0xff;

	if (pin->error == -ETIMEDOUT)
		pr_err("the device did not answer a PIN request: from now on, mappings of frames that are not pinned fail\n");
	else
		pr_warn_ratelimited("%02x:%02x.%x: PIN of %u frames refused: %s (%d)\n",
				    bus, PCI_SLOT(devfn), PCI_FUNC(devfn), pin->nr_frames,
				    pin->status ? status_name(pin->status) : "not by the device",
				    pin->error);
}

/* 0 if every frame was seen pinned. */
int coiommu_pin_end(struct coiommu_pin *pin) __releases(&viommu.lock)
{
	flush(pin);
	spin_unlock_irqrestore(&viommu.lock, pin->flags);

	if (unlikely(pin->error)) {
		coiommu_count(pin_refused);
		report(pin);	/* unlocked: a console may need to map */
	}
	return pin->error;
}

/*
 * Let the device fill the bitmap. A write may be posted; a read is not, and
 * comes after it.
 */
void coiommu_viommu_read_assigned(void)
{
	virtio_cwrite64(viommu.vdev, VIRTIO_IOMMU_CONFIG_ASSIGNED_BITMAP,
			virt_to_phys(viommu.assigned));
	virtio_cread8(viommu.vdev, VIRTIO_IOMMU_CONFIG_PIN_STATUS);
}

/* Endpoints must be in bypass: what the table tracks are guest-physical addresses. */
static int ensure_bypass(struct virtio_device *vdev)
{
	const unsigned int at = offsetof(struct virtio_iommu_config, bypass);

	if (!virtio_has_feature(vdev, VIRTIO_IOMMU_F_BYPASS_CONFIG))
		return 0;
	if (virtio_cread8(vdev, at) == 1)
		return 0;
	virtio_cwrite8(vdev, at, 1);
	if (virtio_cread8(vdev, at) == 1)
		return 0;
	dev_err(&vdev->dev, "the device does not let endpoints bypass translation\n");
	return -EIO;
}

static int turn_pin_on(struct virtio_device *vdev)
{
	u8 status;

	virtio_cwrite64(vdev, VIRTIO_IOMMU_CONFIG_DTT_ROOT, coiommu_dtt_root());
	virtio_cwrite8(vdev, VIRTIO_IOMMU_CONFIG_DTT_LEVELS, coiommu_dtt_levels());
	virtio_cwrite8(vdev, VIRTIO_IOMMU_CONFIG_PIN_FLAGS, VIRTIO_IOMMU_PIN_FLAG_COMPLETE);
	virtio_cwrite8(vdev, VIRTIO_IOMMU_CONFIG_PIN_CONTROL, VIRTIO_IOMMU_PIN_CONTROL_ON);

	status = virtio_cread8(vdev, VIRTIO_IOMMU_CONFIG_PIN_STATUS);
	if (status != VIRTIO_IOMMU_PIN_STATUS_ON) {
		if (status & VIRTIO_IOMMU_PIN_STATUS_REFUSED)
			dev_err(&vdev->dev, "the device refuses to turn pinning on: %s\n",
				status_name(status & ~VIRTIO_IOMMU_PIN_STATUS_REFUSED));
		else
			dev_err(&vdev->dev, "pinning does not turn on: pin_status 0x%02x\n", status);
		return -EIO;
	}

	spin_lock_irq(&viommu.lock);
	viommu.ready = true;
	spin_unlock_irq(&viommu.lock);
	return 0;
}

static int read_limits(struct virtio_device *vdev)
{
	u32 batch_max = virtio_cread32(vdev, VIRTIO_IOMMU_CONFIG_PIN_BATCH_MAX);

	if (!batch_max) {
		dev_err(&vdev->dev, "pin_batch_max is 0\n");
		return -EINVAL;
	}
	viommu.nr_ranges_max = min_t(u32, batch_max, BUFFER_RANGES);
	return 0;
}

static int activate(struct virtio_device *vdev)
{
	int ret;

	ret = ensure_bypass(vdev);
	if (ret)
		return ret;
	ret = read_limits(vdev);
	if (ret)
		return ret;
	coiommu_viommu_read_assigned();

	coiommu_dtt_destroy();	/* what a device that was removed has left */
	ret = coiommu_dtt_create();
	if (ret) {
		dev_err(&vdev->dev, "no tracking table (%d)\n", ret);
		return ret;
	}
	ret = coiommu_hooks_begin(viommu.assigned, vdev->dev.parent);
	if (!ret)
		ret = turn_pin_on(vdev);
	coiommu_hooks_end(!ret);
	return ret;
}

static void free_buffers(void)
{
	free_page((unsigned long)viommu.buffer);
	free_pages_exact(viommu.assigned, VIRTIO_IOMMU_ASSIGNED_BITMAP_SIZE);
	viommu.buffer = NULL;
	viommu.assigned = NULL;
}

static int start(struct virtio_device *vdev)
{
	viommu.vdev = vdev;
	viommu.buffer = (void *)get_zeroed_page(GFP_KERNEL);
	/* Naturally aligned to its pages, contiguous. */
	viommu.assigned = alloc_pages_exact(VIRTIO_IOMMU_ASSIGNED_BITMAP_SIZE,
					    GFP_KERNEL | __GFP_ZERO);
	if (!viommu.buffer || !viommu.assigned)
		return -ENOMEM;

	/* The event queue is left alone: nothing to report to, and some transports cannot interrupt. */
	viommu.vq = virtio_find_single_vq(vdev, NULL, "request");
	if (IS_ERR(viommu.vq)) {
		int ret = PTR_ERR(viommu.vq);

		viommu.vq = NULL;
		return ret;
	}
	virtio_device_ready(vdev);
	return activate(vdev);
}

/* Also undoes a start() that failed half way. */
static void stop(struct virtio_device *vdev)
{
	spin_lock_irq(&viommu.lock);
	viommu.ready = false;
	spin_unlock_irq(&viommu.lock);

	if (viommu.vq) {
		virtio_cwrite8(vdev, VIRTIO_IOMMU_CONFIG_PIN_CONTROL,
			       VIRTIO_IOMMU_PIN_CONTROL_OFF);
		virtio_reset_device(vdev);
		virtqueue_detach_unused_buf(viommu.vq);
		vdev->config->del_vqs(vdev);
		viommu.vq = NULL;
	}
	free_buffers();
	viommu.vdev = NULL;
}

static int check_device(struct virtio_device *vdev)
{
	if (!virtio_has_feature(vdev, VIRTIO_IOMMU_F_PIN_PAGE)) {
		dev_err(&vdev->dev, "this virtio-iommu has no PIN_PAGE: not a coIOMMU\n");
		return -ENODEV;
	}
	if (cc_platform_has(CC_ATTR_GUEST_MEM_ENCRYPT)) {
		dev_err(&vdev->dev, "guest memory is encrypted: the host could not read the table\n");
		return -EOPNOTSUPP;
	}
	if (coiommu_hooks_count()) {
		dev_err(&vdev->dev, "functions are hooked since an earlier device: unbind their drivers first\n");
		return -EBUSY;
	}
	return 0;
}

static int viommu_probe(struct virtio_device *vdev)
{
	int ret;

	if (atomic_cmpxchg(&viommu.claimed, 0, 1)) {
		dev_err(&vdev->dev, "there is a coIOMMU already\n");
		return -EBUSY;
	}
	ret = check_device(vdev);
	if (ret)
		goto unclaim;
	ret = start(vdev);
	if (ret) {
		stop(vdev);
		goto unclaim;
	}
	dev_info(&vdev->dev, "pinning is on: %u table levels, up to %u ranges a request\n",
		 coiommu_dtt_levels(), viommu.nr_ranges_max);
	return 0;
unclaim:
	atomic_set(&viommu.claimed, 0);
	return ret;
}

/*
 * With functions still hooked (the module stays then, but a device can be
 * unbound or unplugged at any time), this fails closed: the table stays, so that
 * what is mapped can be unmapped, and P is forgotten in all of it, so that no
 * new mapping succeeds. P must not be believed any longer: a host without PIN
 * may release its pins once all assigned functions were reset (abi.md section
 * 4, "frozen"), and nobody would clear P. Once these drivers are unbound, a
 * device can be bound again and starts with a new table.
 */
static void viommu_remove(struct virtio_device *vdev)
{
	unsigned int left = coiommu_hooks_stop();

	stop(vdev);
	coiommu_dtt_forget_pins();
	if (left)
		dev_warn(&vdev->dev, "%u functions can map no more: unbind their drivers\n", left);
	atomic_set(&viommu.claimed, 0);
}

#ifdef CONFIG_PM_SLEEP
/*
 * Waking up resets the machine for the host, which then releases all pins,
 * while mappings survive in the guest: nobody would pin them again.
 */
static int viommu_freeze(struct virtio_device *vdev)
{
	dev_err(&vdev->dev, "a guest with pinned DMA buffers cannot be suspended\n");
	return -EOPNOTSUPP;
}
#endif

static const unsigned int features[] = {
	VIRTIO_IOMMU_F_BYPASS,
	VIRTIO_IOMMU_F_BYPASS_CONFIG,
	VIRTIO_IOMMU_F_PIN_PAGE,
};

static const struct virtio_device_id ids[] = {
	{ VIRTIO_ID_IOMMU, VIRTIO_DEV_ANY_ID },
	{ 0 }
};
MODULE_DEVICE_TABLE(virtio, ids);

static struct virtio_driver viommu_driver = {
	.driver.name		= KBUILD_MODNAME,
	.driver.owner		= THIS_MODULE,
	.id_table		= ids,
	.feature_table		= features,
	.feature_table_size	= ARRAY_SIZE(features),
	.probe			= viommu_probe,
	.remove			= viommu_remove,
#ifdef CONFIG_PM_SLEEP
	.freeze			= viommu_freeze,
#endif
};

int coiommu_viommu_register(void)
{
	return register_virtio_driver(&viommu_driver);
}

void coiommu_viommu_unregister(void)
{
	unregister_virtio_driver(&viommu_driver);
}

// SPDX-License-Identifier: GPL-2.0
/* The virtio-iommu device with PIN_PAGE: configuration, control and requests. abi.md section 3. */
#include <linux/cc_platform.h>
#include <linux/gfp.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/scatterlist.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>

#include "coiommu.h"

/* A host that takes longer is taken for dead: the CPU spins all that time. */
#define PIN_WAIT_MS		5000
/*
 * Notifications get lost: QEMU 7.2 drops an access to an x-pci-proxy-dev while
 * another CPU has one under way ("Blocked re-entrant IO").
 */
#define RENOTIFY_MS		10
/* How many polls between two looks at the clock, which may be slow to read. */
#define POLLS_PER_CLOCK		256

static struct {
	atomic_t claimed;	/* one device at a time: there is one table */
	struct virtio_device *vdev;
	struct virtqueue *vq;	/* with PIN on, the lock of requests.c protects it */
	bool kick_due;		/* alike */
	u8 *assigned;		/* filled by the device */
	struct coiommu_limits limits;
} viommu;

static int send_request(const void *request, size_t size, void *reply, size_t reply_size)
{
	struct scatterlist out, in, *sgs[] = { &out, &in };
	int ret;

	sg_init_one(&out, request, size);
	sg_init_one(&in, reply, reply_size);
	ret = virtqueue_add_sgs(viommu.vq, sgs, 1, 1, reply, GFP_ATOMIC);
	if (!ret)
		viommu.kick_due = true;
	return ret;
}

/* ORDERING: virtqueue_get_buf() has a read barrier; see struct coiommu_channel. */
static int await_answer(void)
{
	ktime_t deadline = 0, renotify = 0;
	unsigned int len, polls = 0;

	/* One for all that was sent: each leaves the guest. */
	if (viommu.kick_due) {
		viommu.kick_due = false;
		coiommu_count(kicks);
		virtqueue_kick(viommu.vq);
	}
	while (!virtqueue_get_buf(viommu.vq, &len)) {
		ktime_t now;

		cpu_relax();
		if (polls++ % POLLS_PER_CLOCK)
			continue;
		now = ktime_get();
		if (!deadline)
			deadline = ktime_add_ms(now, PIN_WAIT_MS);
		else if (ktime_after(now, renotify)) {
			coiommu_count(kicks);
			virtqueue_notify(viommu.vq);
		} else
			continue;
		renotify = ktime_add_ms(now, RENOTIFY_MS);
		if (ktime_after(now, deadline) || virtqueue_is_broken(viommu.vq))
			return -ETIMEDOUT;
	}
	return len;
}

static bool request_returned(void)
{
	unsigned int len;

	return virtqueue_get_buf(viommu.vq, &len);
}

static const struct coiommu_channel channel = {
	.send		= send_request,
	.await		= await_answer,
	.returned	= request_returned,
};

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

static bool set_bypass(struct virtio_device *vdev, u8 bypass)
{
	const unsigned int at = offsetof(struct virtio_iommu_config, bypass);

	if (!virtio_has_feature(vdev, VIRTIO_IOMMU_F_BYPASS_CONFIG))
		return bypass;
	if (virtio_cread8(vdev, at) == bypass)
		return true;
	virtio_cwrite8(vdev, at, bypass);
	return virtio_cread8(vdev, at) == bypass;
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

/* What domains may be; all of it once, because an access may get lost later: see RENOTIFY_MS. */
static void read_limits(struct virtio_device *vdev)
{
	struct coiommu_limits *limits = &viommu.limits;

	*limits = (struct coiommu_limits){
		.can_map = virtio_has_feature(vdev, VIRTIO_IOMMU_F_MAP_UNMAP),
		.last = U64_MAX,
		.domain_last = U32_MAX,
	};
	virtio_cread_le(vdev, struct virtio_iommu_config, page_size_mask, &limits->page_size_mask);
	virtio_cread_le_feature(vdev, VIRTIO_IOMMU_F_INPUT_RANGE, struct virtio_iommu_config,
				input_range.start, &limits->first);
	virtio_cread_le_feature(vdev, VIRTIO_IOMMU_F_INPUT_RANGE, struct virtio_iommu_config,
				input_range.end, &limits->last);
	virtio_cread_le_feature(vdev, VIRTIO_IOMMU_F_DOMAIN_RANGE, struct virtio_iommu_config,
				domain_range.start, &limits->domain_first);
	virtio_cread_le_feature(vdev, VIRTIO_IOMMU_F_DOMAIN_RANGE, struct virtio_iommu_config,
				domain_range.end, &limits->domain_last);
	virtio_cread_le_feature(vdev, VIRTIO_IOMMU_F_PROBE, struct virtio_iommu_config,
				probe_size, &limits->probe_size);
}

const struct coiommu_limits *coiommu_viommu_limits(void)
{
	return &viommu.limits;
}

static int turn_pin_on(struct virtio_device *vdev)
{
	u32 endpoint;
	u8 status;

	virtio_cwrite64(vdev, VIRTIO_IOMMU_CONFIG_DTT_ROOT, coiommu_dtt_root());
	virtio_cwrite8(vdev, VIRTIO_IOMMU_CONFIG_DTT_LEVELS, coiommu_dtt_levels());
	virtio_cwrite8(vdev, VIRTIO_IOMMU_CONFIG_PIN_FLAGS, VIRTIO_IOMMU_PIN_FLAG_COMPLETE);
	virtio_cwrite8(vdev, VIRTIO_IOMMU_CONFIG_PIN_CONTROL, VIRTIO_IOMMU_PIN_CONTROL_ON);

	status = virtio_cread8(vdev, VIRTIO_IOMMU_CONFIG_PIN_STATUS);
	if (status & VIRTIO_IOMMU_PIN_STATUS_REFUSED) {
		status &= ~VIRTIO_IOMMU_PIN_STATUS_REFUSED;
		dev_err(&vdev->dev, "the device refuses to turn pinning on: %s\n",
			coiommu_status_name(status));
		return coiommu_status_to_errno(status) ?: -EIO;
	}
	if (status != VIRTIO_IOMMU_PIN_STATUS_ON) {
		dev_err(&vdev->dev, "pinning does not turn on: pin_status 0x%02x\n", status);
		return -EIO;
	}

	coiommu_requests_enable();
	if (!coiommu_hooks_any(&endpoint))
		return 0;
	return coiommu_dtt_for_each_live(pin_live_frames, &endpoint);
}

static int activate(struct virtio_device *vdev)
{
	int ret;

	coiommu_viommu_read_assigned();

	ret = coiommu_dtt_create();
	if (ret) {
		dev_err(&vdev->dev, "no tracking table (%d)\n", ret);
		return ret;
	}
	coiommu_dtt_mark_writable(virtio_has_feature(vdev, VIRTIO_IOMMU_F_PIN_DIRTY));
	ret = coiommu_hooks_begin(viommu.assigned, vdev->dev.parent);
	/* What the table tracks are guest-physical addresses; and nobody is remapped now. */
	if (!ret && !set_bypass(vdev, 1)) {
		dev_err(&vdev->dev, "the device does not let endpoints bypass translation\n");
		ret = -EIO;
	}
	if (!ret)
		ret = turn_pin_on(vdev);
	if (ret)
		coiommu_hooks_end(false);
	return ret;	/* see viommu_scan() */
}

static int start(struct virtio_device *vdev)
{
	static const char * const names[] = { "request", "event" };
	vq_callback_t *callbacks[] = { NULL, NULL };
	u32 batch_max = virtio_cread32(vdev, VIRTIO_IOMMU_CONFIG_PIN_BATCH_MAX);
	struct virtqueue *vqs[ARRAY_SIZE(names)];
	int ret;

	if (!batch_max) {
		dev_err(&vdev->dev, "pin_batch_max is 0\n");
		return -EINVAL;
	}
	viommu.vdev = vdev;
	/* Contiguous, and aligned to a page. */
	viommu.assigned = alloc_pages_exact(VIRTIO_IOMMU_ASSIGNED_BITMAP_SIZE,
					    GFP_KERNEL | __GFP_ZERO);
	if (!viommu.assigned)
		return -ENOMEM;

	/* Both are polled: some transports cannot interrupt. */
	ret = virtio_find_vqs(vdev, ARRAY_SIZE(vqs), vqs, callbacks, names, NULL);
	if (ret)
		return ret;
	viommu.vq = vqs[0];
	ret = coiommu_faults_open(vqs[1]);
	if (ret)
		return ret;
	coiommu_pin_limit(batch_max);
	read_limits(vdev);
	ret = coiommu_requests_open(&channel);
	if (ret)
		return ret;
	virtio_device_ready(vdev);
	coiommu_faults_start();
	return activate(vdev);
}

/* Also undoes a start() that failed half way. */
static void stop(struct virtio_device *vdev)
{
	coiommu_requests_disable();
	if (viommu.vq) {
		coiommu_faults_stop();
		virtio_cwrite8(vdev, VIRTIO_IOMMU_CONFIG_PIN_CONTROL,
			       VIRTIO_IOMMU_PIN_CONTROL_OFF);
		virtio_reset_device(vdev);
		virtqueue_detach_unused_buf(viommu.vq);
		coiommu_faults_close();
		coiommu_requests_close();
		vdev->config->del_vqs(vdev);
		viommu.vq = NULL;
		coiommu_dtt_forget_pins();
	}
	if (viommu.assigned)
		free_pages_exact(viommu.assigned, VIRTIO_IOMMU_ASSIGNED_BITMAP_SIZE);
	viommu.assigned = NULL;
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
	dev_info(&vdev->dev, "pinning is on, %u table levels\n", coiommu_dtt_levels());
	return 0;
unclaim:
	atomic_set(&viommu.claimed, 0);
	return ret;
}

/*
 * Called when the core is done with the device after a probe that succeeded. Not
 * earlier, so that no PIN request of another CPU meets the core's last look at
 * the device's status: see RENOTIFY_MS.
 */
static void viommu_scan(struct virtio_device *vdev)
{
	coiommu_hooks_end(true);
}

/*
 * With functions still hooked (the module stays then, but a device can be
 * unbound or unplugged at any time), this fails closed: the table stays, so that
 * what is mapped can be unmapped, and P is forgotten in all of it, so that no
 * new mapping succeeds. P must not be believed any longer: a host without PIN
 * may release its pins once all assigned functions were reset (abi.md section
 * 4, "frozen"), and nobody would clear P. When a device is bound again, it takes
 * over the table, pins what is mapped, and mappings succeed again.
 *
 * A function that is remapped loses its domain with the reset. In bypass its
 * addresses would then be those of other memory: hence no bypass until the next
 * device, which releases such functions from their drivers first. Tracked ones
 * reach nothing meanwhile either.
 */
static void viommu_remove(struct virtio_device *vdev)
{
	unsigned int left = coiommu_hooks_stop();

	if (coiommu_hooks_any_remapped() && !set_bypass(vdev, 0))
		dev_crit(&vdev->dev, "remapped functions reach memory that is not theirs\n");
	stop(vdev);
	if (left)
		dev_warn(&vdev->dev, "%u functions can map nothing until there is a coIOMMU again\n",
			 left);
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
	VIRTIO_IOMMU_F_INPUT_RANGE,
	VIRTIO_IOMMU_F_DOMAIN_RANGE,
	VIRTIO_IOMMU_F_MAP_UNMAP,
	VIRTIO_IOMMU_F_BYPASS,
	VIRTIO_IOMMU_F_PROBE,
	VIRTIO_IOMMU_F_BYPASS_CONFIG,
	VIRTIO_IOMMU_F_PIN_PAGE,
	VIRTIO_IOMMU_F_PIN_DIRTY,
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
	.scan			= viommu_scan,
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

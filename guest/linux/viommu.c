// SPDX-License-Identifier: GPL-2.0
/* The virtio-iommu device with PIN_PAGE: configuration, control and requests. abi.md section 3. */
#include <linux/gfp.h>
#include <linux/module.h>
#include <linux/scatterlist.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>

#include "coiommu.h"

static struct {
	struct virtio_device *vdev;
	struct virtqueue *vq;	/* with PIN on, the lock of requests.c protects it */
	bool kick_due;		/* alike */
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
static int answered(void)
{
	unsigned int len;

	if (virtqueue_get_buf(viommu.vq, &len))
		return len;
	return virtqueue_is_broken(viommu.vq) ? -ETIMEDOUT : -EAGAIN;
}

static void notify(void)
{
	coiommu_count(kicks);
	virtqueue_notify(viommu.vq);
}

static int await_answer(void)
{
	/* One for all that was sent: each leaves the guest. */
	if (viommu.kick_due) {
		viommu.kick_due = false;
		coiommu_count(kicks);
		virtqueue_kick(viommu.vq);
	}
	return coiommu_await(answered, notify);
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

/*
 * Let the device fill the bitmap. A write may be posted; a read is not, and
 * comes after it.
 */
static void read_assigned(u8 *assigned)
{
	virtio_cwrite64(viommu.vdev, VIRTIO_IOMMU_CONFIG_ASSIGNED_BITMAP,
			virt_to_phys(assigned));
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

static int turn_pin_on(void)
{
	struct virtio_device *vdev = viommu.vdev;
	u8 status;

	coiommu_dtt_mark_writable(virtio_has_feature(vdev, VIRTIO_IOMMU_F_PIN_DIRTY));
	/* What the table tracks are guest-physical addresses; and nobody is remapped now. */
	if (!set_bypass(vdev, 1)) {
		dev_err(&vdev->dev, "the device does not let endpoints bypass translation\n");
		return -EIO;
	}
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
	return 0;
}

static const struct coiommu_device_ops viommu_ops = {
	.read_assigned	= read_assigned,
	.turn_on	= turn_pin_on,
	.limits		= &viommu.limits,
};

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

	/* Both are polled: some transports cannot interrupt. */
	ret = virtio_find_vqs(vdev, ARRAY_SIZE(vqs), vqs, callbacks, names, NULL);
	if (ret)
		return ret;
	viommu.vq = vqs[0];
	ret = coiommu_faults_open(vqs[1]);
	if (ret)
		return ret;
	coiommu_pin_limit(batch_max, U32_MAX);
	read_limits(vdev);
	ret = coiommu_requests_open(&channel);
	if (ret)
		return ret;
	virtio_device_ready(vdev);
	coiommu_faults_start();
	/* coiommu_hooks_end(): see viommu_scan(). */
	return coiommu_device_activate(&viommu_ops, &vdev->dev, vdev->dev.parent);
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
	viommu.vdev = NULL;
}

static int check_device(struct virtio_device *vdev)
{
	if (!virtio_has_feature(vdev, VIRTIO_IOMMU_F_PIN_PAGE)) {
		dev_err(&vdev->dev, "this virtio-iommu has no PIN_PAGE: not a coIOMMU\n");
		return -ENODEV;
	}
	return 0;
}

static int viommu_probe(struct virtio_device *vdev)
{
	int ret;

	ret = check_device(vdev) ?: coiommu_device_claim(&vdev->dev);
	if (ret)
		return ret;
	ret = start(vdev);
	if (ret) {
		stop(vdev);
		coiommu_device_release(&vdev->dev);
		return ret;
	}
	dev_info(&vdev->dev, "pinning is on, %u table levels\n", coiommu_dtt_levels());
	return 0;
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
	coiommu_hooks_stop();
	if (coiommu_hooks_any_remapped() && !set_bypass(vdev, 0))
		dev_crit(&vdev->dev, "remapped functions reach memory that is not theirs\n");
	stop(vdev);
	coiommu_device_release(&vdev->dev);
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

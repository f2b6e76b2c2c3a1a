// SPDX-License-Identifier: GPL-2.0
/*
 * Fault reports of the virtio-iommu device, on its event queue. VIRTIO 1.2
 * section 5.13.6.9.
 */
#include <linux/mm.h>
#include <linux/pci.h>
#include <linux/ratelimit.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/timer.h>
#include <linux/virtio.h>
#include <linux/workqueue.h>

#include "coiommu.h"

/*
 * The queue is polled: some transports cannot interrupt. Between two looks the
 * device can report as many faults as it has buffers, and drops the others.
 */
#define POLL_INTERVAL		HZ

static void poll_events(struct work_struct *work);

static struct virtqueue *events;
static struct virtio_iommu_fault *buffers;
static DECLARE_DELAYED_WORK(poll_work, poll_events);

static const char *reason_name(u8 reason)
{
	switch (reason) {
	case VIRTIO_IOMMU_FAULT_R_DOMAIN:
		return "not attached to a domain";
	case VIRTIO_IOMMU_FAULT_R_MAPPING:
		return "not mapped in its domain";
	default:
		/* "If the driver doesn't recognize reason, it SHOULD treat the fault as if it was [...] UNKNOWN." */
		return "not pinned, or unknown";
	}
}

static void report(const struct virtio_iommu_fault *fault, unsigned int len)
{
	u32 flags = le32_to_cpu(fault->flags);
	u32 endpoint = le32_to_cpu(fault->endpoint);
	u64 address = flags & VIRTIO_IOMMU_FAULT_F_ADDRESS ? le64_to_cpu(fault->address) : 0;

	if (len < sizeof(*fault)) {
		coiommu_count(bad_events);
		dev_err_ratelimited(&events->vdev->dev, "an event of %u bytes\n", len);
		return;
	}
	/* "If the reserved field is not zero, the driver MUST ignore the fault report." */
	if (memchr_inv(fault->reserved, 0, sizeof(fault->reserved))) {
		coiommu_count(bad_events);
		return;
	}
	coiommu_count(faults);
	dev_err_ratelimited(&events->vdev->dev,
			    "DMA fault of %04x:%02x:%02x.%x: %s%s of %s0x%llx: %s\n",
			    endpoint >> 16, PCI_BUS_NUM(endpoint), PCI_SLOT(endpoint),
			    PCI_FUNC(endpoint),
			    flags & VIRTIO_IOMMU_FAULT_F_READ ? "read" : "",
			    flags & VIRTIO_IOMMU_FAULT_F_WRITE ? "write" : "",
			    flags & VIRTIO_IOMMU_FAULT_F_ADDRESS ? "" : "an unknown address, not ",
			    address, reason_name(fault->reason));
}

static int give(struct virtio_iommu_fault *buffer)
{
	struct scatterlist sg;

	sg_init_one(&sg, buffer, sizeof(*buffer));
	return virtqueue_add_inbuf(events, &sg, 1, buffer, GFP_KERNEL);
}

static void poll_events(struct work_struct *work)
{
	struct virtio_iommu_fault *fault;
	unsigned int len, left = virtqueue_get_vring_size(events);
	bool given = false;

	/* Bounded: a device could report without end. */
	while (left-- && (fault = virtqueue_get_buf(events, &len))) {
		report(fault, len);
		if (!give(fault))
			given = true;
	}
	/* A PIN request's notification that QEMU 7.2 drops because of this one is repeated: see requests.c. */
	if (given)
		virtqueue_kick(events);
	schedule_delayed_work(&poll_work, round_jiffies_relative(POLL_INTERVAL));
}

/* Give the device all the buffers that its queue has room for; @vq is not used before coiommu_faults_start(). */
int coiommu_faults_open(struct virtqueue *vq)
{
	unsigned int i, nr = virtqueue_get_vring_size(vq);
	int ret = 0;

	events = vq;
	buffers = kcalloc(nr, sizeof(*buffers), GFP_KERNEL);
	if (!buffers)
		return -ENOMEM;
	for (i = 0; i < nr && !ret; i++)
		ret = give(&buffers[i]);
	return ret;
}

/* The device is ready. */
void coiommu_faults_start(void)
{
	virtqueue_kick(events);
	schedule_delayed_work(&poll_work, round_jiffies_relative(POLL_INTERVAL));
}

/* Before the device is reset; may be called without a start. */
void coiommu_faults_stop(void)
{
	cancel_delayed_work_sync(&poll_work);
}

/* After the device was reset; may be called without an open. */
void coiommu_faults_close(void)
{
	if (events)
		while (virtqueue_detach_unused_buf(events))
			;
	events = NULL;
	kfree(buffers);
	buffers = NULL;
}

// SPDX-License-Identifier: GPL-2.0
/*
 * PIN requests. abi.md section 3, "PIN request".
 *
 * They are made by mappings, so in atomic context: one at a time, under a
 * spinlock with interrupts off, and the answer is polled for.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cache.h>
#include <linux/mm.h>
#include <linux/pci.h>
#include <linux/ratelimit.h>
#include <linux/spinlock.h>

#include "coiommu.h"

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
	spinlock_t lock;	/* protects all of it, and the channel */
	bool on;		/* the device has said that PIN is on */
	bool lost;		/* it has not given the buffer back in time */
	const struct coiommu_channel *channel;
	struct pin_buffer *buffer;
	u32 nr_ranges;		/* of the request being built */
	u32 nr_ranges_max;
	u32 nr_frames;
} requests = {
	.lock = __SPIN_LOCK_UNLOCKED(requests.lock),
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

const char *coiommu_status_name(u8 status)
{
	return status < ARRAY_SIZE(status_names) ? status_names[status] : "unknown status";
}

int coiommu_status_to_errno(u8 status)
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

/* Send the request in the buffer and wait: the status of abi.md section 3, or an errno. */
static int exchange(u32 endpoint)
{
	struct virtio_iommu_req_pin *request = &requests.buffer->request;
	struct virtio_iommu_req_tail *tail = &requests.buffer->tail;
	int ret;

	lockdep_assert_held(&requests.lock);

	request->head = (struct virtio_iommu_req_head){ .type = VIRTIO_IOMMU_T_PIN };
	request->endpoint = cpu_to_le32(endpoint);
	request->flags = 0;
	request->nr_ranges = cpu_to_le32(requests.nr_ranges);
	*tail = (struct virtio_iommu_req_tail){ .status = STATUS_UNANSWERED };

	ret = requests.channel->send(request, struct_size(request, ranges, requests.nr_ranges),
				     tail);
	if (ret)
		return ret;
	coiommu_count(pin_requests);

	ret = requests.channel->await();
	if (ret < 0) {
		/* The buffer may be the device's still: leave it alone. See recover(). */
		requests.lost = true;
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
	const struct virtio_iommu_pin_range *range = requests.buffer->request.ranges;
	u32 i, j;

	for (i = 0; i < requests.nr_ranges; i++, range++)
		for (j = 0; j < le32_to_cpu(range->nr_frames); j++)
			if (!coiommu_dtt_pinned(le64_to_cpu(range->gfn) + j))
				return false;
	return true;
}

static void flush(struct coiommu_pin *pin)
{
	int ret;

	if (!requests.nr_ranges || pin->error)
		return;

	pin->nr_frames = requests.nr_frames;
	ret = exchange(pin->endpoint);
	if (ret < 0) {
		pin->error = ret;
	} else if (ret != VIRTIO_IOMMU_S_OK) {
		count_status(ret);
		pin->status = ret;
		pin->error = coiommu_status_to_errno(ret);
	} else if (!all_pinned()) {
		coiommu_count(pin_not_seen);
		pin->error = -EPROTO;
	} else {
		coiommu_add(pin_frames, requests.nr_frames);
	}
	requests.nr_ranges = 0;
	requests.nr_frames = 0;
}

/*
 * A device that was late (its process was stopped, say) may have answered by
 * now. That mapping has failed long since; the buffer is ours again, and frames
 * pinned for nothing are the host's to unpin.
 */
static bool recover(void)
{
	if (!requests.lost || !requests.on || !requests.channel->returned())
		return false;
	requests.lost = false;
	return true;
}

/* Start the pin requests of one mapping. Its frames have been counted up. */
void coiommu_pin_begin(struct coiommu_pin *pin, u32 endpoint) __acquires(&requests.lock)
{
	unsigned long flags;

	*pin = (struct coiommu_pin){ .endpoint = endpoint };
	spin_lock_irqsave(&requests.lock, flags);
	pin->flags = flags;
	pin->recovered = recover();
	requests.nr_ranges = 0;
	requests.nr_frames = 0;
}

static void add_frame(struct coiommu_pin *pin, u64 gfn)
{
	struct virtio_iommu_pin_range *range;

	if (requests.nr_ranges) {
		u64 start, end;

		range = &requests.buffer->request.ranges[requests.nr_ranges - 1];
		start = le64_to_cpu(range->gfn);
		end = start + le32_to_cpu(range->nr_frames);
		if (gfn >= start && gfn < end)
			return;		/* neighbours in a list may share a frame */
		if (gfn == end) {
			le32_add_cpu(&range->nr_frames, 1);
			requests.nr_frames++;
			return;
		}
	}
	if (requests.nr_ranges == requests.nr_ranges_max) {
		flush(pin);
		if (pin->error)
			return;
	}
	range = &requests.buffer->request.ranges[requests.nr_ranges++];
	*range = (struct virtio_iommu_pin_range){
		.gfn = cpu_to_le64(gfn),
		.nr_frames = cpu_to_le32(1),
	};
	requests.nr_frames++;
}

/* Ask for those of @nr frames that are not pinned. */
void coiommu_pin_add(struct coiommu_pin *pin, u64 gfn, u64 nr)
{
	lockdep_assert_held(&requests.lock);

	/* Without a device there is no buffer to fill. */
	if (!pin->error && (!requests.on || requests.lost)) {
		coiommu_count(pin_off);
		pin->nr_frames = nr;
		pin->error = -ENODEV;
	}
	for (; nr && !pin->error; gfn++, nr--)
		if (!coiommu_dtt_pinned(gfn))
			add_frame(pin, gfn);
}

static const char *reason(const struct coiommu_pin *pin)
{
	if (pin->status)
		return coiommu_status_name(pin->status);
	switch (pin->error) {
	case -ENODEV:
		return "no device that answers";
	case -EPROTO:
		return "the device says OK, but P is clear";
	default:
		return "cannot be sent";
	}
}

static void report(const struct coiommu_pin *pin)
{
	u8 devfn = pin->endpoint & 0xff;

	if (pin->recovered)
		pr_warn("the device answers again\n");
	if (pin->error == -ETIMEDOUT)
		pr_err("the device does not answer: new mappings fail until it does\n");
	else if (pin->error)
		pr_warn_ratelimited("%02x:%02x.%x: PIN of %u frames refused: %s (%d)\n",
				    PCI_BUS_NUM(pin->endpoint), PCI_SLOT(devfn), PCI_FUNC(devfn),
				    pin->nr_frames, reason(pin), pin->error);
}

/* 0 if every frame was seen pinned. */
int coiommu_pin_end(struct coiommu_pin *pin) __releases(&requests.lock)
{
	flush(pin);
	spin_unlock_irqrestore(&requests.lock, pin->flags);

	if (pin->error)
		coiommu_count(pin_refused);
	report(pin);	/* unlocked: a console may need to map */
	return pin->error;
}

/* @nr_ranges_max: what the device accepts. Requests are refused until coiommu_pin_enable(). */
int coiommu_pin_open(const struct coiommu_channel *channel, u32 nr_ranges_max)
{
	requests.buffer = (void *)get_zeroed_page(GFP_KERNEL);
	if (!requests.buffer)
		return -ENOMEM;
	requests.channel = channel;
	requests.nr_ranges_max = min_t(u32, nr_ranges_max, BUFFER_RANGES);
	return 0;
}

void coiommu_pin_enable(void)
{
	spin_lock_irq(&requests.lock);
	requests.on = true;
	spin_unlock_irq(&requests.lock);
}

/* From now on no request is made, and none is out unless the device has lost it. */
void coiommu_pin_disable(void)
{
	spin_lock_irq(&requests.lock);
	requests.on = false;
	spin_unlock_irq(&requests.lock);
}

/* Caller: the device has been reset, so that a buffer it had lost is ours again. */
void coiommu_pin_close(void)
{
	if (!requests.buffer)
		return;
	requests.lost = false;
	requests.channel = NULL;
	free_page((unsigned long)requests.buffer);
	requests.buffer = NULL;
}

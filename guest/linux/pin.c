// SPDX-License-Identifier: GPL-2.0
/*
 * PIN requests: what mappings ask for whose frames are not pinned. abi.md
 * section 3, "PIN request".
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cache.h>
#include <linux/mm.h>
#include <linux/pci.h>
#include <linux/ratelimit.h>

#include "coiommu.h"

/* In one page, shared with the device while a request is out. */
struct pin_buffer {
	struct virtio_iommu_req_tail tail;
	struct virtio_iommu_req_pin request ____cacheline_aligned;
};

#define BUFFER_RANGES	((PAGE_SIZE - sizeof(struct pin_buffer)) / \
			 sizeof(struct virtio_iommu_pin_range))

/* The request being built. Protected by the turn. */
static struct {
	struct pin_buffer *buffer;	/* the turn's page */
	u32 nr_ranges;
	u32 nr_ranges_max;		/* what the device accepts */
	u32 nr_frames;
	u32 nr_frames_max;
} building;

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
	struct virtio_iommu_req_pin *request = &building.buffer->request;
	struct virtio_iommu_req_tail *tail = &building.buffer->tail;
	int ret;

	request->head = (struct virtio_iommu_req_head){ .type = VIRTIO_IOMMU_T_PIN };
	request->endpoint = cpu_to_le32(endpoint);
	request->flags = 0;
	request->nr_ranges = cpu_to_le32(building.nr_ranges);
	*tail = (struct virtio_iommu_req_tail){ .status = COIOMMU_UNANSWERED };

	ret = coiommu_turn_send(request, struct_size(request, ranges, building.nr_ranges),
				tail, sizeof(*tail));
	if (ret)
		return ret;
	coiommu_count(pin_requests);

	ret = coiommu_turn_await();
	if (ret < 0) {
		coiommu_count(pin_lost);
		return ret;
	}
	/* VIRTIO 1.2: a device that does not know a request writes nothing. */
	return ret < sizeof(*tail) ? VIRTIO_IOMMU_S_UNSUPP : tail->status;
}

/*
 * The host says that it has set P in every frame of the request, or says nothing
 * (abi.md section 5); each mapping must see it before its device may have the address. abi.md section 2.
 */
static bool all_pinned(void)
{
	const struct virtio_iommu_pin_range *range = building.buffer->request.ranges;
	u32 i, j;

	for (i = 0; i < building.nr_ranges; i++, range++)
		for (j = 0; j < le32_to_cpu(range->nr_frames); j++)
			if (!coiommu_dtt_pinned(le64_to_cpu(range->gfn) + j))
				return false;
	return true;
}

static void flush(struct coiommu_pin *pin)
{
	int ret;

	if (!building.nr_ranges || pin->error)
		return;

	pin->nr_frames = building.nr_frames;
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
		coiommu_add(pin_frames, building.nr_frames);
	}
	building.nr_ranges = 0;
	building.nr_frames = 0;
}

/* Start the pin requests of one mapping. Its frames have been counted up. */
void coiommu_pin_begin(struct coiommu_pin *pin, u32 endpoint)
{
	*pin = (struct coiommu_pin){ .endpoint = endpoint };
	coiommu_turn_begin(&pin->turn);
	building.buffer = pin->turn.page;
	building.nr_ranges = 0;
	building.nr_frames = 0;
}

static void add_frame(struct coiommu_pin *pin, u64 gfn)
{
	struct virtio_iommu_pin_range *range;

	if (building.nr_ranges) {
		u64 start, end;

		range = &building.buffer->request.ranges[building.nr_ranges - 1];
		start = le64_to_cpu(range->gfn);
		end = start + le32_to_cpu(range->nr_frames);
		if (gfn >= start && gfn < end)
			return;		/* neighbours in a list may share a frame */
		if (gfn == end && building.nr_frames < building.nr_frames_max) {
			le32_add_cpu(&range->nr_frames, 1);
			building.nr_frames++;
			return;
		}
	}
	if (building.nr_ranges == building.nr_ranges_max ||
	    building.nr_frames == building.nr_frames_max) {
		flush(pin);
		if (pin->error)
			return;
	}
	range = &building.buffer->request.ranges[building.nr_ranges++];
	*range = (struct virtio_iommu_pin_range){
		.gfn = cpu_to_le64(gfn),
		.nr_frames = cpu_to_le32(1),
	};
	building.nr_frames++;
}

/* Ask for those of @nr frames that are not pinned. */
void coiommu_pin_add(struct coiommu_pin *pin, u64 gfn, u64 nr)
{
	/* Without a device there is no buffer to fill. */
	if (!pin->error && !building.buffer) {
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
		return "the device has answered, but P is clear";
	default:
		return "cannot be sent";
	}
}

static void report(const struct coiommu_pin *pin)
{
	u8 devfn = pin->endpoint & 0xff;

	coiommu_turn_report(&pin->turn, pin->error);
	if (pin->error && pin->error != -ETIMEDOUT)
		pr_warn_ratelimited("%02x:%02x.%x: PIN of %u frames refused: %s (%d)\n",
				    PCI_BUS_NUM(pin->endpoint), PCI_SLOT(devfn), PCI_FUNC(devfn),
				    pin->nr_frames, reason(pin), pin->error);
}

/* 0 if every frame was seen pinned. */
int coiommu_pin_end(struct coiommu_pin *pin)
{
	flush(pin);
	coiommu_turn_end(&pin->turn);

	if (pin->error)
		coiommu_count(pin_refused);
	report(pin);	/* unlocked: a console may need to map */
	return pin->error;
}

/* What the device accepts in a request. Caller: there is no channel. */
void coiommu_pin_limit(u32 nr_ranges, u32 nr_frames)
{
	building.nr_frames_max = nr_frames;
	building.nr_ranges_max = min_t(u32, nr_ranges, BUFFER_RANGES);
}

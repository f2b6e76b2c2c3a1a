// SPDX-License-Identifier: GPL-2.0
/*
 * The request queue of the device, one user at a time.
 *
 * Requests are made by mappings, so in atomic context: under a spinlock with
 * interrupts off, and answers are polled for.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/gfp.h>
#include <linux/ktime.h>
#include <linux/printk.h>
#include <linux/spinlock.h>

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
	spinlock_t lock;	/* protects all of it, and the channel */
	bool on;		/* the device has said that PIN is on */
	unsigned int out;	/* requests that the device has not answered */
	const struct coiommu_channel *channel;
	void *page;
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

/**
 * coiommu_await - poll for an answer, as channels do
 * @answered: length of the answer, -EAGAIN while there is none, or an errno
 * @notify: tell the device once more that there is something to do
 */
int coiommu_await(int (*answered)(void), void (*notify)(void))
{
	ktime_t deadline = 0, renotify = 0;
	unsigned int polls = 0;
	int ret;

	while ((ret = answered()) == -EAGAIN) {
		ktime_t now;

		cpu_relax();
		if (polls++ % POLLS_PER_CLOCK)
			continue;
		now = ktime_get();
		if (!deadline)
			deadline = ktime_add_ms(now, PIN_WAIT_MS);
		else if (ktime_after(now, renotify))
			notify();
		else
			continue;
		renotify = ktime_add_ms(now, RENOTIFY_MS);
		if (ktime_after(now, deadline))
			return -ETIMEDOUT;
	}
	return ret;
}

/*
 * A device that was late (its process was stopped, say) may have answered by
 * now. Those who asked have failed long since; the page is ours again, and frames
 * pinned for nothing are the host's to unpin.
 */
static bool recover(void)
{
	if (!requests.out || !requests.on)
		return false;
	while (requests.out && requests.channel->returned())
		requests.out--;
	return !requests.out;
}

void coiommu_turn_begin(struct coiommu_turn *turn) __acquires(&requests.lock)
{
	unsigned long flags;

	spin_lock_irqsave(&requests.lock, flags);
	turn->flags = flags;
	turn->recovered = recover();
	/* While a request is out, the page may be the device's still. */
	turn->page = requests.on && !requests.out ? requests.page : NULL;
}

/* -ENOSPC: the queue is full; what is out must be awaited first. */
int coiommu_turn_send(const void *request, size_t size, void *reply, size_t reply_size)
{
	int ret;

	lockdep_assert_held(&requests.lock);
	ret = requests.channel->send(request, size, reply, reply_size);
	if (!ret)
		requests.out++;
	return ret;
}

/*
 * Until the device has answered one more: the length that it wrote. After an
 * error this turn must not touch its page any more.
 */
int coiommu_turn_await(void)
{
	int ret;

	lockdep_assert_held(&requests.lock);
	ret = requests.channel->await();
	if (ret >= 0)
		requests.out--;
	return ret;
}

void coiommu_turn_end(struct coiommu_turn *turn) __releases(&requests.lock)
{
	spin_unlock_irqrestore(&requests.lock, turn->flags);
}

/* What the device has done to the queue. Caller: holds no lock, because a console may need to map. */
void coiommu_turn_report(const struct coiommu_turn *turn, int error)
{
	if (turn->recovered)
		pr_warn("the device answers again\n");
	if (error == -ETIMEDOUT)
		pr_err("the device does not answer: new mappings fail until it does\n");
}

/* Requests are refused until coiommu_requests_enable(). */
int coiommu_requests_open(const struct coiommu_channel *channel)
{
	requests.page = (void *)get_zeroed_page(GFP_KERNEL);
	if (!requests.page)
		return -ENOMEM;
	requests.channel = channel;
	return 0;
}

void coiommu_requests_enable(void)
{
	spin_lock_irq(&requests.lock);
	requests.on = true;
	spin_unlock_irq(&requests.lock);
}

/* From now on no request is made, and none is out unless the device has lost it. */
void coiommu_requests_disable(void)
{
	spin_lock_irq(&requests.lock);
	requests.on = false;
	spin_unlock_irq(&requests.lock);
}

/* Caller: the device has been reset, so that what it had not answered is ours again. */
void coiommu_requests_close(void)
{
	if (!requests.page)
		return;
	requests.out = 0;
	requests.channel = NULL;
	free_page((unsigned long)requests.page);
	requests.page = NULL;
}

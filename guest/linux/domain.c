// SPDX-License-Identifier: GPL-2.0
/*
 * Domains of remapped functions, one for each: its addresses (IOVAs), and the
 * requests that give them a meaning. VIRTIO 1.2 sections 5.13.6.3 to 5.13.6.7.
 *
 * An address is free again only when its UNMAP has succeeded. Strict: that is
 * before an unmap returns. Lazy: unmaps are queued, and their UNMAPs are sent
 * together when the queue is full or 10 ms old, as Linux does; until then the
 * device can still reach what was unmapped, and the host keeps it pinned.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cache.h>
#include <linux/delay.h>
#include <linux/idr.h>
#include <linux/iova.h>
#include <linux/mm.h>
#include <linux/pci.h>
#include <linux/pfn.h>
#include <linux/ratelimit.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/timer.h>

#include "coiommu.h"

/* Linux's flush queue: unmaps in it, and how long they may wait. */
#define LAZY_MAX	250
#define LAZY_MS		10
/*
 * An UNMAP is refused while the device keeps a DMA window open (DEVERR after 2
 * ms on our host): then it is tried again, and given up in the end.
 */
#define UNMAP_TRIES	3
#define DETACH_TRIES	50
#define DETACH_WAIT_MS	20

struct unmapped {
	u64 iova;
	u64 size;		/* 0: the address is free again */
};

/**
 * struct coiommu_domain - addresses of one function
 * @id: the device's name for it
 * @endpoint: that is attached to it
 * @iovad: free addresses; has locks of its own
 * @last: page frame number of an address, inclusive
 * @lock: protects the rest: what is unmapped lazily
 */
struct coiommu_domain {
	u32 id;
	u32 endpoint;
	struct iova_domain iovad;
	unsigned long last;
	spinlock_t lock;
	struct timer_list timer;
	unsigned int nr_lazy;
	struct unmapped lazy[LAZY_MAX];
};

/* What one turn sends: VIRTIO_IOMMU_T_MAP, or VIRTIO_IOMMU_T_UNMAP; with its tail. */
union slot {
	struct virtio_iommu_req_map map;
	struct virtio_iommu_req_unmap unmap;
} ____cacheline_aligned;

#define SLOTS	(PAGE_SIZE / sizeof(union slot))

static DEFINE_IDA(ids);
static bool lazy_unmap;

int coiommu_domains_init(bool lazy)
{
	lazy_unmap = lazy;
	return iova_cache_get();
}

void coiommu_domains_exit(void)
{
	iova_cache_put();
}

static void report(const struct coiommu_domain *domain, const struct coiommu_turn *turn,
		   const char *request, int error, u8 status)
{
	u8 devfn = domain->endpoint & 0xff;

	coiommu_turn_report(turn, error);
	if (error && error != -ETIMEDOUT)
		pr_warn_ratelimited("%02x:%02x.%x: %s refused: %s (%d)\n",
				    PCI_BUS_NUM(domain->endpoint), PCI_SLOT(devfn), PCI_FUNC(devfn),
				    request,
				    status ? coiommu_status_name(status) : "no device that answers",
				    error);
}

/* Send @nr requests, which are in the slots of the turn's page, and await them all. */
static int exchange(union slot *slots, unsigned int nr, size_t tail_at)
{
	unsigned int sent = 0, answered = 0;
	int ret = 0;

	while (answered < nr) {
		for (; sent < nr; sent++) {
			struct virtio_iommu_req_tail *tail = (void *)&slots[sent] + tail_at;

			tail->status = COIOMMU_UNANSWERED;
			ret = coiommu_turn_send(&slots[sent], tail_at, tail, sizeof(*tail));
			if (ret)
				break;
		}
		if (sent == answered)
			return ret;
		/* All that fits is awaited together, because it takes one notification. */
		for (; answered < sent; answered++) {
			ret = coiommu_turn_await();
			if (ret < 0) {
				coiommu_count(remap_lost);
				return ret;
			}
		}
	}
	return 0;
}

/* One request in process context. */
static int ask(const struct coiommu_domain *domain, const char *name, void *request, size_t size)
{
	const size_t tail_at = size - sizeof(struct virtio_iommu_req_tail);
	struct coiommu_turn turn;
	u8 status = 0;
	int ret = -ENODEV;

	coiommu_turn_begin(&turn);
	if (turn.page) {
		memcpy(turn.page, request, size);
		ret = exchange(turn.page, 1, tail_at);
		if (!ret) {
			status = *(u8 *)(turn.page + tail_at);
			ret = coiommu_status_to_errno(status);
		}
	}
	coiommu_turn_end(&turn);
	report(domain, &turn, name, ret, status);
	return ret;
}

static int attach(const struct coiommu_domain *domain)
{
	struct virtio_iommu_req_attach request = {
		.head.type = VIRTIO_IOMMU_T_ATTACH,
		.domain = cpu_to_le32(domain->id),
		.endpoint = cpu_to_le32(domain->endpoint),
	};

	return ask(domain, "ATTACH", &request, sizeof(request));
}

static int detach(const struct coiommu_domain *domain)
{
	struct virtio_iommu_req_detach request = {
		.head.type = VIRTIO_IOMMU_T_DETACH,
		.domain = cpu_to_le32(domain->id),
		.endpoint = cpu_to_le32(domain->endpoint),
	};

	return ask(domain, "DETACH", &request, sizeof(request));
}

/* Addresses that the device says are no memory for this endpoint. */
static int reserve(struct coiommu_domain *domain, const u8 *properties, size_t size)
{
	const struct virtio_iommu_probe_property *property;
	const struct virtio_iommu_probe_resv_mem *mem;
	size_t at, length;

	for (at = 0; at + sizeof(*property) <= size; at += sizeof(*property) + length) {
		u64 start, end;

		property = (const void *)(properties + at);
		length = le16_to_cpu(property->length);
		switch (le16_to_cpu(property->type) & VIRTIO_IOMMU_PROBE_T_MASK) {
		case VIRTIO_IOMMU_PROBE_T_NONE:
			return 0;
		case VIRTIO_IOMMU_PROBE_T_RESV_MEM:
			mem = (const void *)property;
			if (at + sizeof(*mem) > size)
				return -EPROTO;
			start = le64_to_cpu(mem->start);
			end = le64_to_cpu(mem->end);
			if (start <= end &&
			    !reserve_iova(&domain->iovad, PHYS_PFN(start), PHYS_PFN(end)))
				return -ENOMEM;
		}
	}
	return 0;
}

static int probe(struct coiommu_domain *domain, u32 probe_size)
{
	const size_t size = sizeof(struct virtio_iommu_req_probe);
	struct virtio_iommu_req_probe *request;
	struct virtio_iommu_req_tail *tail;
	struct coiommu_turn turn;
	u8 status = 0;
	int ret = -ENODEV;

	if (!probe_size)
		return 0;
	if (probe_size > PAGE_SIZE - size - sizeof(*tail)) {
		pr_err("probe_size %u: more than a page\n", probe_size);
		return -E2BIG;
	}
	coiommu_turn_begin(&turn);
	if (turn.page) {
		request = turn.page;
		memset(request, 0, PAGE_SIZE);
		request->head.type = VIRTIO_IOMMU_T_PROBE;
		request->endpoint = cpu_to_le32(domain->endpoint);
		tail = (void *)&request->properties[probe_size];
		tail->status = COIOMMU_UNANSWERED;
		ret = coiommu_turn_send(request, size, request->properties,
					probe_size + sizeof(*tail));
		if (!ret)
			ret = coiommu_turn_await();
		if (ret >= 0) {
			status = tail->status;
			ret = coiommu_status_to_errno(status) ?:
				reserve(domain, request->properties, probe_size);
		} else {
			coiommu_count(remap_lost);
		}
	}
	coiommu_turn_end(&turn);
	report(domain, &turn, "PROBE", ret, status);
	return ret;
}

/* Caller: the device cannot use these addresses. */
void coiommu_iova_free(struct coiommu_domain *domain, u64 iova, u64 size)
{
	free_iova_fast(&domain->iovad, PHYS_PFN(iova), PHYS_PFN(size));
}

/* Returns how many pages of addresses are lost: the device may still use them. */
static u64 send_unmaps(struct coiommu_domain *domain, struct unmapped *ranges, unsigned int nr,
		       struct coiommu_turn *turn)
{
	union slot *slots;
	unsigned int i;
	u64 left = 0;
	int ret;

	coiommu_turn_begin(turn);
	slots = turn->page;
	for (i = 0; slots && i < nr; i++)
		slots[i].unmap = (struct virtio_iommu_req_unmap){
			.head.type = VIRTIO_IOMMU_T_UNMAP,
			.domain = cpu_to_le32(domain->id),
			.virt_start = cpu_to_le64(ranges[i].iova),
			.virt_end = cpu_to_le64(ranges[i].iova + ranges[i].size - 1),
		};
	ret = slots ? exchange(slots, nr, offsetof(struct virtio_iommu_req_unmap, tail)) : -ENODEV;
	for (i = 0; i < nr; i++) {
		if (!ret && slots[i].unmap.tail.status == VIRTIO_IOMMU_S_OK) {
			coiommu_iova_free(domain, ranges[i].iova, ranges[i].size);
			ranges[i].size = 0;
		}
		left += PHYS_PFN(ranges[i].size);
	}
	coiommu_turn_end(turn);
	if (slots)
		coiommu_add(unmap_requests, nr);
	return left;
}

/* Keep what is not free yet. Returns how many that are. */
static unsigned int pack(struct unmapped *ranges, unsigned int nr)
{
	unsigned int i, kept = 0;

	for (i = 0; i < nr; i++)
		if (ranges[i].size)
			ranges[kept++] = ranges[i];
	return kept;
}

/* UNMAP each range of @ranges, which is changed, and free its addresses. Returns pages that leaked. */
static u64 unmap_ranges(struct coiommu_domain *domain, struct unmapped *ranges, unsigned int nr,
			struct coiommu_turn *turn)
{
	unsigned int tries;
	u64 left = 0;

	for (tries = 0; nr && tries < UNMAP_TRIES; tries++) {
		struct coiommu_turn now;

		left = send_unmaps(domain, ranges, nr, &now);
		turn->recovered |= now.recovered;
		turn->page = now.page;
		nr = pack(ranges, nr);
		coiommu_add(unmap_refused, nr);
		if (!now.page)
			break;		/* nobody there who could change his mind */
	}
	coiommu_add(iova_leaked, left);
	return left;
}

static void report_leak(struct coiommu_domain *domain, const struct coiommu_turn *turn, u64 pages)
{
	u8 devfn = domain->endpoint & 0xff;

	coiommu_turn_report(turn, 0);
	if (pages)
		pr_err_ratelimited("%02x:%02x.%x: %llu pages of addresses are lost: UNMAP does not succeed\n",
				   PCI_BUS_NUM(domain->endpoint), PCI_SLOT(devfn), PCI_FUNC(devfn),
				   pages);
}

static u64 flush_locked(struct coiommu_domain *domain, struct coiommu_turn *turn)
{
	unsigned int i, nr;
	u64 leaked = 0;

	lockdep_assert_held(&domain->lock);
	for (i = 0; i < domain->nr_lazy; i += nr) {
		nr = min_t(unsigned int, domain->nr_lazy - i, SLOTS);
		leaked += unmap_ranges(domain, &domain->lazy[i], nr, turn);
	}
	domain->nr_lazy = 0;
	return leaked;
}

/* True if something has been waiting: addresses and frames may be free now. */
bool coiommu_domain_flush(struct coiommu_domain *domain)
{
	struct coiommu_turn turn = {};
	unsigned long flags;
	unsigned int nr;
	u64 leaked;

	spin_lock_irqsave(&domain->lock, flags);
	nr = domain->nr_lazy;
	leaked = flush_locked(domain, &turn);
	spin_unlock_irqrestore(&domain->lock, flags);
	report_leak(domain, &turn, leaked);
	return nr;
}

static void lazy_is_old(struct timer_list *timer)
{
	struct coiommu_domain *domain = from_timer(domain, timer, timer);

	coiommu_domain_flush(domain);
}

void coiommu_domain_unmap_now(struct coiommu_domain *domain, u64 iova, u64 size)
{
	struct unmapped range = { .iova = iova, .size = size };
	struct coiommu_turn turn = {};

	report_leak(domain, &turn, unmap_ranges(domain, &range, 1, &turn));
}

void coiommu_domain_unmap(struct coiommu_domain *domain, u64 iova, u64 size)
{
	struct coiommu_turn turn = {};
	unsigned long flags;
	u64 leaked = 0;

	if (!lazy_unmap) {
		coiommu_domain_unmap_now(domain, iova, size);
		return;
	}
	spin_lock_irqsave(&domain->lock, flags);
	if (domain->nr_lazy == LAZY_MAX)
		leaked = flush_locked(domain, &turn);
	if (!domain->nr_lazy)
		mod_timer(&domain->timer, jiffies + msecs_to_jiffies(LAZY_MS));
	domain->lazy[domain->nr_lazy++] = (struct unmapped){ .iova = iova, .size = size };
	spin_unlock_irqrestore(&domain->lock, flags);
	report_leak(domain, &turn, leaked);
}

/* Like iommu_dma_alloc_iova(): below 4 GiB first, which every device and bus can do. 0: none is free. */
static u64 alloc_iova_below(struct coiommu_domain *domain, u64 size, u64 mask)
{
	const unsigned long low = PHYS_PFN(DMA_BIT_MASK(32));
	unsigned long last = min_t(unsigned long, PHYS_PFN(mask), domain->last);
	unsigned long pfn = 0;

	if (last > low)
		pfn = alloc_iova_fast(&domain->iovad, PHYS_PFN(size), low, false);
	if (!pfn)
		pfn = alloc_iova_fast(&domain->iovad, PHYS_PFN(size), last, true);
	return PFN_PHYS(pfn);
}

/* 0: no address is free, also not after those that wait to be. */
u64 coiommu_iova_alloc(struct coiommu_domain *domain, u64 size, u64 mask)
{
	u64 iova = alloc_iova_below(domain, size, mask);

	if (!iova && coiommu_domain_flush(domain))
		iova = alloc_iova_below(domain, size, mask);
	return iova;
}

void coiommu_maps_begin(struct coiommu_maps *maps, struct coiommu_domain *domain, u32 flags)
{
	*maps = (struct coiommu_maps){ .domain = domain, .flags = flags };
	coiommu_turn_begin(&maps->turn);
	if (!maps->turn.page)
		maps->error = -ENODEV;
}

static void send_maps(struct coiommu_maps *maps)
{
	union slot *slots = maps->turn.page;
	unsigned int i;

	if (!maps->nr || maps->error)
		return;
	maps->error = exchange(slots, maps->nr, offsetof(struct virtio_iommu_req_map, tail));
	coiommu_add(map_requests, maps->nr);
	for (i = 0; i < maps->nr && !maps->error; i++) {
		maps->status = slots[i].map.tail.status;
		maps->error = coiommu_status_to_errno(maps->status);
	}
	maps->nr = 0;
}

/* Where both go on where the last piece ended, it is one piece. */
void coiommu_maps_add(struct coiommu_maps *maps, u64 iova, phys_addr_t phys, u64 size)
{
	struct virtio_iommu_req_map *map;

	if (maps->error)
		return;
	if (maps->nr) {
		map = &((union slot *)maps->turn.page)[maps->nr - 1].map;
		if (le64_to_cpu(map->virt_end) + 1 == iova &&
		    le64_to_cpu(map->phys_start) + iova - le64_to_cpu(map->virt_start) == phys) {
			map->virt_end = cpu_to_le64(iova + size - 1);
			return;
		}
	}
	if (maps->nr == SLOTS) {
		send_maps(maps);
		if (maps->error)
			return;
	}
	map = &((union slot *)maps->turn.page)[maps->nr++].map;
	*map = (struct virtio_iommu_req_map){
		.head.type = VIRTIO_IOMMU_T_MAP,
		.domain = cpu_to_le32(maps->domain->id),
		.virt_start = cpu_to_le64(iova),
		.virt_end = cpu_to_le64(iova + size - 1),
		.phys_start = cpu_to_le64(phys),
		.flags = cpu_to_le32(maps->flags),
	};
}

/* 0 if all is mapped; else some of it may be. */
int coiommu_maps_end(struct coiommu_maps *maps)
{
	send_maps(maps);
	coiommu_turn_end(&maps->turn);
	if (maps->error)
		coiommu_count(map_refused);
	report(maps->domain, &maps->turn, "MAP", maps->error, maps->status);
	return maps->error;
}

static int check_limits(struct device *dev, const struct coiommu_limits *limits)
{
	if (!limits->can_map) {
		dev_err(dev, "coiommu: the device has no MAP and UNMAP\n");
		return -EOPNOTSUPP;
	}
	if (!limits->page_size_mask || BIT_ULL(__ffs64(limits->page_size_mask)) > PAGE_SIZE ||
	    limits->last < limits->first || limits->last - limits->first < 2 * PAGE_SIZE) {
		dev_err(dev, "coiommu: the device cannot map single pages\n");
		return -EOPNOTSUPP;
	}
	if (!dev_is_dma_coherent(dev)) {
		dev_err(dev, "coiommu: functions that do not snoop caches are not remapped\n");
		return -EOPNOTSUPP;
	}
	return 0;
}

struct coiommu_domain *coiommu_domain_create(struct device *dev, u32 endpoint,
					     const struct coiommu_limits *limits)
{
	struct coiommu_domain *domain;
	int ret;

	ret = check_limits(dev, limits);
	if (ret)
		return NULL;
	domain = kzalloc(sizeof(*domain), GFP_KERNEL);
	if (!domain)
		return NULL;
	domain->endpoint = endpoint;
	spin_lock_init(&domain->lock);
	timer_setup(&domain->timer, lazy_is_old, 0);
	/* Address 0 is left out: it is how the allocator says that it has none. */
	init_iova_domain(&domain->iovad, PAGE_SIZE,
			 max_t(u64, 1, PHYS_PFN(PAGE_ALIGN(limits->first))));
	domain->last = limits->last == U64_MAX ? PHYS_PFN(U64_MAX) : PHYS_PFN(limits->last + 1) - 1;
	ret = iova_domain_init_rcaches(&domain->iovad);
	if (ret)
		goto free;
	ret = ida_alloc_range(&ids, limits->domain_first, min_t(u32, limits->domain_last, INT_MAX),
			      GFP_KERNEL);
	if (ret < 0)
		goto free;
	domain->id = ret;
	ret = probe(domain, limits->probe_size);
	if (!ret)
		ret = attach(domain);
	if (ret)
		goto free_id;
	dev_info(dev, "coiommu: DMA is remapped, in domain %u\n", domain->id);
	return domain;
free_id:
	ida_free(&ids, domain->id);
free:
	put_iova_domain(&domain->iovad);
	kfree(domain);
	dev_err(dev, "coiommu: no domain (%d): it can map nothing\n", ret);
	return NULL;
}

/*
 * Caller: no driver is bound, so nothing is mapped. An id is used again only if
 * the device has surely forgotten the domain.
 */
void coiommu_domain_destroy(struct coiommu_domain *domain)
{
	unsigned int tries = 0;
	int ret;

	del_timer_sync(&domain->timer);
	coiommu_domain_flush(domain);
	while ((ret = detach(domain)) && ret != -ENODEV && ret != -ETIMEDOUT &&
	       ++tries < DETACH_TRIES)
		msleep(DETACH_WAIT_MS);
	if (!ret)
		ida_free(&ids, domain->id);
	else if (ret != -ENODEV)
		pr_err("domain %u cannot be left: its function reaches what it had mapped, and nothing else\n",
		       domain->id);
	put_iova_domain(&domain->iovad);
	kfree(domain);
}

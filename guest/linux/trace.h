/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Trace events of tracked functions: what is counted up and down, segment by
 * segment. src/machine/qemu/trace-text.ts reads what they print.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM coiommu

#if !defined(COIOMMU_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define COIOMMU_TRACE_H

#include <linux/dma-direct.h>
#include <linux/pci.h>
#include <linux/tracepoint.h>

#include "coiommu.h"

/*
 * @addr is what the device gets; printed is the guest physical address.
 * @left: segments of the same list that follow, each an event of its own, on
 * this CPU and with no other of these events between.
 */
DECLARE_EVENT_CLASS(coiommu_segment,
	TP_PROTO(struct coiommu_hook *hook, dma_addr_t addr, size_t size, unsigned int left),
	TP_ARGS(hook, addr, size, left),
	TP_STRUCT__entry(
		__field(u64, addr)
		__field(u64, size)
		__field(u32, endpoint)
		__field(u32, left)
	),
	TP_fast_assign(
		__entry->addr = dma_to_phys(&hook->shadow, addr);
		__entry->size = size;
		__entry->endpoint = hook->endpoint;
		__entry->left = left;
	),
	TP_printk("%04x:%02x:%02x.%x addr=%llx size=%llu left=%u",
		  __entry->endpoint >> 16, PCI_BUS_NUM(__entry->endpoint),
		  PCI_SLOT(__entry->endpoint), PCI_FUNC(__entry->endpoint),
		  __entry->addr, __entry->size, __entry->left)
);

/* After it was counted and pinned. */
DEFINE_EVENT(coiommu_segment, coiommu_map,
	TP_PROTO(struct coiommu_hook *hook, dma_addr_t addr, size_t size, unsigned int left),
	TP_ARGS(hook, addr, size, left)
);

/* Before it is counted down. */
DEFINE_EVENT(coiommu_segment, coiommu_unmap,
	TP_PROTO(struct coiommu_hook *hook, dma_addr_t addr, size_t size, unsigned int left),
	TP_ARGS(hook, addr, size, left)
);

#endif /* COIOMMU_TRACE_H */

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>

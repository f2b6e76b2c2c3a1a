/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Generated from src/wire by tools/generate-guest-header.ts. Do not edit.
 * Section numbers are those of docs/abi.md.
 */
#ifndef COIOMMU_ABI_H
#define COIOMMU_ABI_H

#include <linux/build_bug.h>
#include <linux/stddef.h>
#include <linux/types.h>
#include <linux/virtio_ids.h>
#include <uapi/linux/virtio_iommu.h>

/* Section 1: the DMA Tracking Table */
#define COIOMMU_ENTRY_PRESENT			0x1
#define COIOMMU_ENTRY_SIZE			8
#define COIOMMU_ENTRY_BITS			9
#define COIOMMU_LEAF_BITS			10
#define COIOMMU_LEVELS_MAX			5
#define COIOMMU_TABLE_SIZE			4096
#define COIOMMU_TU_COUNT			0x0000ffffu
#define COIOMMU_TU_RESERVED			0x0fff0000u
#define COIOMMU_TU_DIRTY			0x10000000u
#define COIOMMU_TU_WRITABLE			0x20000000u
#define COIOMMU_TU_ACCESSED			0x40000000u
#define COIOMMU_TU_PINNED			0x80000000u
#define COIOMMU_UNIT_SIZE			4

/* Section 3: the PIN_PAGE extension of virtio-iommu */
#define VIRTIO_IOMMU_ASSIGNED_BITMAP_SIZE	8192
#define VIRTIO_IOMMU_PIN_CONTROL_OFF		0
#define VIRTIO_IOMMU_PIN_CONTROL_ON		1
#define VIRTIO_IOMMU_PIN_CONTROL_PARK		2
#define VIRTIO_IOMMU_PIN_CONTROL_UNPARK		3
#define VIRTIO_IOMMU_PIN_FLAG_COMPLETE		0x1
#define VIRTIO_IOMMU_PIN_STATUS_OFF		0
#define VIRTIO_IOMMU_PIN_STATUS_ON		1
#define VIRTIO_IOMMU_PIN_STATUS_PARKED		2
#define VIRTIO_IOMMU_PIN_STATUS_REFUSED		0x80
#define VIRTIO_IOMMU_F_PIN_PAGE			16
#define VIRTIO_IOMMU_F_PIN_DIRTY		17
#define VIRTIO_IOMMU_T_PIN			0x40

/* Section 3: configuration, byte offsets */
#define VIRTIO_IOMMU_CONFIG_ASSIGNED_BITMAP	64
#define VIRTIO_IOMMU_CONFIG_DTT_ROOT		72
#define VIRTIO_IOMMU_CONFIG_DTT_LEVELS		80
#define VIRTIO_IOMMU_CONFIG_PIN_CONTROL		81
#define VIRTIO_IOMMU_CONFIG_PIN_STATUS		82
#define VIRTIO_IOMMU_CONFIG_PIN_FLAGS		83
#define VIRTIO_IOMMU_CONFIG_PIN_BATCH_MAX	84
#define VIRTIO_IOMMU_CONFIG_PIN_QUOTA		88
#define VIRTIO_IOMMU_CONFIG_SIZE		96
/* The standard's part ends before ours begins. */
static_assert(sizeof(struct virtio_iommu_config) <= VIRTIO_IOMMU_CONFIG_ASSIGNED_BITMAP);
static_assert(offsetof(struct virtio_iommu_config, bypass) == 36);

/* Section 3: PIN request; the tail lies in the device-writable part. */
struct virtio_iommu_pin_range {
	__le64					gfn;
	__le32					nr_frames;
	__le32					reserved;
} __packed;
static_assert(sizeof(struct virtio_iommu_pin_range) == 16);
static_assert(offsetof(struct virtio_iommu_pin_range, gfn) == 0);
static_assert(offsetof(struct virtio_iommu_pin_range, nr_frames) == 8);
static_assert(offsetof(struct virtio_iommu_pin_range, reserved) == 12);

struct virtio_iommu_req_pin {
	struct virtio_iommu_req_head		head;
	__le32					endpoint;
	__le32					flags;
	__le32					nr_ranges;
	struct virtio_iommu_pin_range		ranges[];
} __packed;
static_assert(sizeof(struct virtio_iommu_req_pin) == 16);
static_assert(offsetof(struct virtio_iommu_req_pin, endpoint) == 4);
static_assert(offsetof(struct virtio_iommu_req_pin, flags) == 8);
static_assert(offsetof(struct virtio_iommu_req_pin, nr_ranges) == 12);

/* Section 5: the crosvm-compatible PCI function */
#define COIOMMU_TRIGGERS			24
#define COIOMMU_BAR_SIZE			8192
#define COIOMMU_CMD_DEACTIVATE			0
#define COIOMMU_CMD_ACTIVATE			1
#define COIOMMU_CMD_PARK_UNPIN			2
#define COIOMMU_CMD_UNPARK_UNPIN		3
#define COIOMMU_MMIO_BAR			0
#define COIOMMU_NOTIFYMAP_BAR			2
#define COIOMMU_REVISION_ID			16
#define COIOMMU_TOPOLOGYMAP_BAR			4
#define PCI_DEVICE_ID_COIOMMU			0xabcd
#define PCI_VENDOR_ID_COIOMMU			0x1234
#define COIOMMU_PFN_SIZE			8
#define COIOMMU_REG_DTT_ROOT			0
#define COIOMMU_REG_COMMAND			8
#define COIOMMU_REG_DTT_LEVEL			16
#define COIOMMU_SLOT_SIZE			8
#define COIOMMU_PIN_PAGES_IN_BATCH		0x8000000000000000ull

/* nr_pages frame numbers of 64 bits follow. */
struct pin_pages_info {
	__le16					bdf;
	__u8					pad[6];
	__le64					nr_pages;
} __packed;
static_assert(sizeof(struct pin_pages_info) == 16);
static_assert(offsetof(struct pin_pages_info, bdf) == 0);
static_assert(offsetof(struct pin_pages_info, pad) == 2);
static_assert(offsetof(struct pin_pages_info, nr_pages) == 8);

/* The standard's numbers, as the host side has them */
static_assert(VIRTIO_ID_IOMMU == 23);
static_assert(sizeof(struct virtio_iommu_req_head) == 4);
static_assert(sizeof(struct virtio_iommu_req_tail) == 4);
static_assert(VIRTIO_IOMMU_ATTACH_F_BYPASS == 1);
static_assert(VIRTIO_IOMMU_F_BYPASS == 3);
static_assert(VIRTIO_IOMMU_F_PROBE == 4);
static_assert(VIRTIO_IOMMU_F_MMIO == 5);
static_assert(VIRTIO_IOMMU_FAULT_F_READ == 1);
static_assert(VIRTIO_IOMMU_FAULT_F_WRITE == 2);
static_assert(VIRTIO_IOMMU_FAULT_F_ADDRESS == 256);
static_assert(VIRTIO_IOMMU_FAULT_R_UNKNOWN == 0);
static_assert(VIRTIO_IOMMU_FAULT_R_DOMAIN == 1);
static_assert(VIRTIO_IOMMU_FAULT_R_MAPPING == 2);
static_assert(VIRTIO_IOMMU_F_BYPASS_CONFIG == 6);
static_assert(VIRTIO_IOMMU_F_DOMAIN_RANGE == 1);
static_assert(VIRTIO_IOMMU_F_INPUT_RANGE == 0);
static_assert(VIRTIO_IOMMU_F_MAP_UNMAP == 2);
static_assert(VIRTIO_IOMMU_MAP_F_READ == 1);
static_assert(VIRTIO_IOMMU_MAP_F_WRITE == 2);
static_assert(VIRTIO_IOMMU_MAP_F_MMIO == 4);
static_assert(VIRTIO_IOMMU_PROBE_T_RESV_MEM == 1);
static_assert(VIRTIO_IOMMU_RESV_MEM_T_RESERVED == 0);
static_assert(VIRTIO_IOMMU_RESV_MEM_T_MSI == 1);
static_assert(VIRTIO_IOMMU_S_OK == 0);
static_assert(VIRTIO_IOMMU_S_IOERR == 1);
static_assert(VIRTIO_IOMMU_S_UNSUPP == 2);
static_assert(VIRTIO_IOMMU_S_DEVERR == 3);
static_assert(VIRTIO_IOMMU_S_INVAL == 4);
static_assert(VIRTIO_IOMMU_S_RANGE == 5);
static_assert(VIRTIO_IOMMU_S_NOENT == 6);
static_assert(VIRTIO_IOMMU_S_FAULT == 7);
static_assert(VIRTIO_IOMMU_S_NOMEM == 8);
static_assert(VIRTIO_IOMMU_T_ATTACH == 1);
static_assert(VIRTIO_IOMMU_T_DETACH == 2);
static_assert(VIRTIO_IOMMU_T_MAP == 3);
static_assert(VIRTIO_IOMMU_T_UNMAP == 4);
static_assert(VIRTIO_IOMMU_T_PROBE == 5);

#endif /* COIOMMU_ABI_H */

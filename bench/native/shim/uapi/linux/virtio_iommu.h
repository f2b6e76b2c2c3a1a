#include <linux/virtio_iommu.h>

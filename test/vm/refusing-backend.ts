/** The backend of a VM that refuses UNMAPs, as while a device keeps a DMA window open: one in as many as the test says. */
import { workerData } from "node:worker_threads";
import { Backend } from "../../src/control/backend.ts";
import { RemappingRequests } from "../../src/virtio/iommu-requests.ts";
import { VIRTIO_IOMMU_S_DEVERR } from "../../src/wire/virtio-iommu.ts";

const every = Number(process.env.COIOMMU_TEST_REFUSED);
const { unmap } = RemappingRequests.prototype;
let asked = 0;
RemappingRequests.prototype.unmap = function (request) {
  return ++asked % every === 0 ? VIRTIO_IOMMU_S_DEVERR : unmap.call(this, request);
};
new Backend(workerData).run();

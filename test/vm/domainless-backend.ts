/** The backend of a VM that forgets to tell devices of their domains: they take all addresses for guest physical ones. */
import { workerData } from "node:worker_threads";
import { Backend } from "../../src/control/backend.ts";
import { SoftwareIommu } from "../../src/tracking/software-iommu.ts";

SoftwareIommu.prototype.setContext = () => {};
new Backend(workerData).run();

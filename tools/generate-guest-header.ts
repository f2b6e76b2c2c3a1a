/** Writes guest/linux/coiommu_abi.h. Run after a change of src/wire/dtt.ts or virtio-iommu.ts. */
import { writeFileSync } from "node:fs";
import { guestHeader } from "../src/wire/guest-header.ts";

writeFileSync(new URL("../guest/linux/coiommu_abi.h", import.meta.url), guestHeader());

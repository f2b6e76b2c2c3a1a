import { workerData } from "node:worker_threads";
import { DiskThread } from "./disk.ts";

new DiskThread(workerData).run();

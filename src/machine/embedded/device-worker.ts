import { workerData } from "node:worker_threads";
import { DeviceThread } from "./device.ts";

new DeviceThread(workerData).run();

//! Our numbers beside `cuda.h`'s, where there is a C compiler and that header.

use std::fmt::Write as _;
use std::process::Command;

use crate::sys::ALL;

#[test]
fn numbers_are_those_of_cuda_h() {
    let mut source = String::from("#include <cuda.h>\n");
    for (name, value) in ALL {
        writeln!(source, "_Static_assert({name} == {value}, \"{name}\");").expect("a string grows");
    }
    let header = "#include <cuda.h>\n";
    let compile = |source: &str| {
        let folder = std::env::temp_dir();
        let path = folder.join(format!("anyfabric-cuda-layout-{}.c", std::process::id()));
        std::fs::write(&path, source).expect("a file");
        let mut command = Command::new("cc");
        if let Ok(include) = std::env::var("CUDA_INCLUDE") {
            command.arg(format!("-I{include}"));
        }
        let output = command.args(["-I/usr/local/cuda/include", "-fsyntax-only"]).arg(&path).output();
        let _ = std::fs::remove_file(&path);
        output
    };
    match compile(header) {
        Ok(output) if output.status.success() => {}
        _ => return println!("skipped: no C compiler with cuda.h; CUDA_INCLUDE names its folder"),
    }
    let output = compile(&source).expect("it compiled before");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

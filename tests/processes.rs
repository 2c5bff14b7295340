//! Processes: children of both kinds, their lives and their deaths.
use farcall::Local;
use farcall::sys::WaitStatus;

#[tokio::test]
async fn smoke() {
    let root = Local::new().start().await.unwrap();
    println!("root {:?} {}", root.pid(), root.getpid().await.unwrap());
    let mut child = root.child().spawn().await.unwrap();
    println!("child {:?} {}", child.pid(), child.getpid().await.unwrap());
    let mut shared = root.child().share_memory().share_files().spawn().await.unwrap();
    println!("shared {:?} {}", shared.pid(), shared.getpid().await.unwrap());
    let grand = shared.child().spawn().await.unwrap();
    println!("grand {:?} {}", grand.pid(), grand.getpid().await.unwrap());
    let mut echo = grand.child().share_memory().share_files().spawn().await.unwrap();
    echo.execve("/bin/echo", ["echo", "hello"], ["A=b"]).await.unwrap();
    assert_eq!(echo.wait().await.unwrap(), WaitStatus::Exited(0));
    child.exit(42).await.unwrap();
    assert_eq!(child.wait().await.unwrap(), WaitStatus::Exited(42));
    shared.exit(43).await.unwrap();
    assert_eq!(shared.wait().await.unwrap(), WaitStatus::Exited(43));
}
